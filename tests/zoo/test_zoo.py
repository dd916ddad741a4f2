"""Pretrained networks: each reaches the accuracy of its record, to the image, and can be trained further."""

import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from run_script import run_command

import bnn_jax
from bnn_jax.data import load_dataset, normalize
from bnn_jax.data.prepare import default_data_dir
from bnn_jax.errors import UsageError
from bnn_jax.models import MODELS
from bnn_jax.zoo import DATA, PRETRAINED, file_of, load
from bnn_jax.zoo.records import ENDING, FILES

ROOT = Path(__file__).parents[2]
OWN = [name for name, record in PRETRAINED.items() if record.same_as is None]
DIGITS = "digits_xnor_resnet6"


@pytest.fixture(scope="module")
def digits():
    return load(DIGITS)


def test_every_file_has_its_record_and_every_record_its_file():
    assert {path.name.removesuffix(ENDING) for path in FILES.glob(f"*{ENDING}")} == set(OWN)
    for name, record in PRETRAINED.items():
        assert file_of(name).is_file() and record.network in MODELS and record.data in DATA
        if record.same_as is not None:
            assert record == PRETRAINED[record.same_as]._replace(same_as=record.same_as)


@pytest.mark.parametrize("name", OWN)
def test_the_file_says_what_the_record_says(name):
    network, record = load(name), PRETRAINED[name]
    tested = network.packed.metadata["tested"]
    assert tested["data"]["name"] == record.data and (tested["split"], tested["which"]) == ("test", "best")
    assert (tested["examples"], round(tested["accuracy"] * tested["examples"])) == (record.examples, record.correct)
    assert network.packed.metadata["model"]["name"] == record.network
    assert len(network.class_names) == network.packed.num_classes
    assert (ROOT / record.source).exists()


@pytest.mark.default_flags
@pytest.mark.parametrize("name", OWN)
def test_the_accuracy_is_reproduced_to_the_image(name):
    """With fewer optimizations of the compiler an image of thousands, of two all but equal logits, may change sides."""
    network, folder = load(name), default_data_dir()
    if network.record.data != "digits" and not (folder / network.record.data).is_dir():
        pytest.skip(f"{network.record.data} is not in {folder}; $TFDS_DATA_DIR names the folder of prepared sets")
    copies = DATA[network.record.data].copies
    if copies and copies not in (note := load_dataset(network.record.data).note):
        pytest.skip(f"its figure is of {copies}, and {folder} has {note}")
    correct, examples = network.count_correct()
    slack = 0 if "BNN_JAX_TESTS_AT_DEFAULT_FLAGS" in os.environ else examples // 5000
    assert examples == network.record.examples and abs(correct - network.record.correct) <= slack


@pytest.mark.parametrize("name", [pytest.param(name, marks=pytest.mark.full) for name in OWN[1:]] + OWN[:1])
def test_latent_variables_give_the_same_logits_and_labels(name):
    network = load(name)
    images = np.random.default_rng(0).integers(0, 256, (64, *network.input_shape), np.uint8)
    if network.record.data == "digits":
        images = load_dataset("digits").test.images
    logits = np.asarray(network.packed.logits(images))
    latent = np.asarray(replace(network.packed, variables=network.variables).logits(images))
    np.testing.assert_allclose(latent, logits, rtol=0, atol=1e-5 * np.abs(logits).max())
    np.testing.assert_array_equal(latent.argmax(axis=1), logits.argmax(axis=1))


@pytest.mark.full
def test_further_training_begins_at_the_network(digits):
    """In training, with the statistics of a batch, it is as good as in evaluation."""
    data = load_dataset("digits")
    images, labels = data.train.images[:256], data.train.labels[:256]
    variables = digits.variables_for(images)
    x = normalize(images, mean=data.mean, std=data.std)
    (logits, _), _ = digits.model.apply(variables, x, train=True, progress=1.0, mutable=["batch_stats"])
    assert (np.asarray(logits).argmax(axis=1) == labels).mean() > 0.97


def test_what_a_user_sees(digits):
    record = digits.record
    assert repr(digits).startswith(f"Pretrained({DIGITS}: digits, {record.correct} of 359 right, ")
    assert digits.input_shape == (8, 8, 1) and digits.class_names == tuple("0123456789")
    assert digits.licence.startswith("CC BY 4.0") and digits.file_bytes == file_of(DIGITS).stat().st_size
    assert bnn_jax.zoo.load is load


def test_an_unknown_name_is_refused_with_the_nearest():
    with pytest.raises(UsageError, match=r"`name` .='digits_xnor_resnet'. is not known; did you mean 'digits_xnor_re"):
        load("digits_xnor_resnet")


def test_evaluate_takes_a_pretrained_network(digits):
    accuracy = f"test: accuracy {100 * digits.record.accuracy:.2f} % on 359 examples (packed)\n"
    assert run_command("evaluate", f"zoo:{DIGITS}").stdout == accuracy
    done = run_command("evaluate", "zoo:digits", code=2)
    assert done.stderr.startswith("error: `name` (='digits') is not known; did you mean 'digits_")
