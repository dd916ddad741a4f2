"""What a network returns is known, not guessed: logits alone are read as the logits of a pair are."""

from dataclasses import replace
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from networks import SIGNS, random_variables

from bnn_jax.layers import BatchNorm, BinaryConv, BinaryDense
from bnn_jax.outputs import logits_of, outputs_of
from bnn_jax.packed import PackedModel, freeze, to_stablehlo, verify
from bnn_jax.packed.tflite.model import tflite_bytes
from bnn_jax.training.config import Config, ModelConfig, OptimConfig
from bnn_jax.training.epoch import evaluate
from bnn_jax.training.experiment import ImageInfo, make_experiment
from bnn_jax.training.step import init_state, train_step

SHAPE, IMAGES, CLASSES = (6, 6, 3), 5, 10
METADATA = {"image_shape": SHAPE, "mean": (120.0,) * 3, "std": (60.0,) * 3}
FORMS = {
    "logits alone": lambda logits: logits,
    "with intermediates": lambda logits: (logits, {"stage1": logits}),
    "with none": lambda logits: (logits, None),
}


class Network(nn.Module):
    """Two binary layers; `form` is what it returns of its logits."""

    form: Any = FORMS["logits alone"]
    num_classes: int = CLASSES

    @nn.compact
    def __call__(self, images, *, train, progress=1.0):
        x = BinaryConv(8, name="conv", **SIGNS)(images, train=train, progress=progress)
        x = BatchNorm(name="norm")(x, train=train)
        x = BinaryDense(self.num_classes, name="head", **SIGNS)(
            x.reshape(x.shape[0], -1), train=train, progress=progress
        )
        return self.form(BatchNorm(use_scale=False, use_bias=False, name="head_norm")(x, train=train))


PAIR = Network(FORMS["with intermediates"])


@pytest.fixture(scope="module")
def variables():
    return random_variables(PAIR, SHAPE)


@pytest.fixture(scope="module")
def packed(variables):
    return freeze(PAIR, variables, SHAPE)


@pytest.fixture(scope="module")
def images():
    return np.random.default_rng(2).integers(0, 256, (IMAGES, *SHAPE), dtype=np.uint8)


@pytest.fixture(scope="module")
def normalized(images):
    return jnp.asarray((images - np.float32(120)) / np.float32(60))


@pytest.fixture(scope="module")
def logits(variables, normalized):
    """Of the trained network, read by hand."""
    found = PAIR.apply(variables, normalized, train=False)[0]
    assert found.shape == (IMAGES, CLASSES) and len(set(np.asarray(found.argmax(-1)).tolist())) > 1
    return np.asarray(found)


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("examples", [1, 2, 5])
def test_the_known_forms(name, examples):
    """Two examples are the pair that a tuple of two could be taken for."""
    logits = jnp.arange(float(examples * CLASSES)).reshape(examples, CLASSES)
    np.testing.assert_array_equal(logits_of(FORMS[name](logits)), logits)
    assert set(outputs_of(FORMS[name](logits)).intermediates) == ({"stage1"} if "inter" in name else set())


WRONG = {
    "a list": ([jnp.zeros((5, 10))], "got a list"),
    "a dict": ({"logits": jnp.zeros((5, 10))}, "got a dict"),
    "two heads": ((jnp.zeros((5, 10)), jnp.zeros((5, 10))), "got a tuple of array, array"),
    "three results": ((jnp.zeros((5, 10)), {}, {}), "got a tuple of array, dict, dict"),
    "nothing": ((), "got a tuple of nothing"),
    "intermediates first": (({}, jnp.zeros((5, 10))), "got a tuple of dict, array"),
    "one example": (jnp.zeros(10), r"got float32 of shape \(10,\)"),
    "classes": ((jnp.zeros((5, 10), jnp.int32), {}), r"got int32 of shape \(5, 10\)"),
}


@pytest.mark.parametrize("name", WRONG)
def test_other_forms_are_refused(name):
    returned, found = WRONG[name]
    with pytest.raises(TypeError, match=rf"must return logits \(batch, classes\), or \(logits, a mapping .*; {found}$"):
        logits_of(returned)


@pytest.mark.parametrize("name", ["logits alone", "with none"])
def test_the_packed_model_and_its_stablehlo_return_a_row_for_each_image(name, packed, images, logits):
    network = PackedModel(Network(FORMS[name]), packed, METADATA)
    np.testing.assert_allclose(network.logits(images), logits, 1e-5, 1e-5)
    np.testing.assert_array_equal(network.predict(images), logits.argmax(-1))
    assert network.accuracy([(images, logits.argmax(-1))]) == (1.0, IMAGES)
    pytest.importorskip("flatbuffers", reason="the package flatbuffers is not installed")
    exported = jax.export.deserialize(bytearray(to_stablehlo(network, platforms=("cpu",))))
    np.testing.assert_allclose(exported.call(images), logits, 1e-5, 1e-5)


def test_freezing_does_not_depend_on_the_form(variables, packed):
    found = freeze(Network(), variables, SHAPE)
    assert jax.tree.structure(found) == jax.tree.structure(packed)
    assert jax.tree.all(jax.tree.map(lambda a, b: (a == b).all(), found, packed))


@pytest.mark.parametrize("name", ["logits alone", "with none"])
def test_the_tflite_file_returns_all_logits(name, variables, normalized, logits):
    pytest.importorskip("flatbuffers", reason="the package flatbuffers is not installed")
    from tflite_interpreter import interpret

    found = interpret(tflite_bytes(Network(FORMS[name]), variables, SHAPE), np.asarray(normalized))
    np.testing.assert_allclose(found, logits, 1e-4, 1e-4)


def test_verify_counts_every_prediction_that_differs(variables, packed, normalized, logits):
    """Logits with the other sign: of five images five predictions differ, and not one."""
    norm = packed["packed"]["head_norm"]
    other = {"packed": packed["packed"] | {"head_norm": jax.tree.map(jnp.negative, norm)}}
    assert (logits.argmax(-1) != logits.argmin(-1)).all()
    found = verify(Network(), variables, other, [normalized])
    assert (found.examples, found.differing_predictions, found.passed) == (IMAGES, IMAGES, False)


def test_training_and_evaluating_read_both_forms(images):
    """One step on two images, the batch that unpacks like a pair."""
    config = Config("test", epochs=1, batch_size=2, model=ModelConfig("resnet6"), optim=OptimConfig("adam"))
    config = replace(config, data=replace(config.data, crop_padding=0, flip=False))
    info = ImageInfo(SHAPE, CLASSES, (120.0,) * 3, (60.0,) * 3)
    experiment = make_experiment(config, info, total_steps=1)
    x, labels = jnp.asarray(images[:2]), jnp.array([3, 4])

    def run(form):
        own = experiment._replace(model=Network(form))
        state = init_state(own, 0)
        after, metrics = train_step(own, state, x, labels)
        return metrics, evaluate(own, after.params, after.model_state, x, labels)

    ours, wanted = jax.jit(lambda: (run(FORMS["logits alone"]), run(FORMS["with intermediates"])))()
    assert jax.tree.all(jax.tree.map(lambda a, b: bool(a == b), ours, wanted))
    assert ours[1]["examples"] == 2
