"""What is read from disk while a run trains gives the run that the same data in memory give."""

import json
import re
from dataclasses import replace

import numpy as np
import pytest
from small_sets import write_mnist

from bnn_jax.data.synthetic import write_synthetic_imagenet
from bnn_jax.errors import RunError
from bnn_jax.training.config import Config, DataConfig, ModelConfig, OptimConfig
from bnn_jax.training.evaluation import evaluate_run
from bnn_jax.training.input_pipeline import SkippedExampleWarning
from bnn_jax.training.loop import train

CONFIG = Config(
    "test",
    epochs=2,
    batch_size=8,
    scan_steps=4,
    model=ModelConfig("mnist_mlp", width=8),
    optim=OptimConfig("adam", 0.01),
    loss="cross_entropy",
)


class Stop(Exception):
    """Stands for a process that ends without a chance to save."""


@pytest.fixture(scope="module")
def mnist(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mnist")
    write_mnist(folder)
    return folder


@pytest.fixture
def memory_and_stream(mnist, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    memory = DataConfig("mnist", data_dir=str(mnist), crop_padding=2, flip=True)
    return replace(CONFIG, data=memory), replace(CONFIG, data=replace(memory, stream=True))


def what_it_left(workdir):
    """Records less times, and the hashes of the last state."""
    records = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    newest = max((workdir / "checkpoints").glob("*.json"), key=lambda path: int(path.stem))
    timeless = [{key: value for key, value in record.items() if "time" not in key} for record in records]
    return timeless, json.loads(newest.read_text())["leaves"]


@pytest.mark.full
def test_a_stream_gives_the_run_of_the_same_set_in_memory_bit_for_bit(memory_and_stream, tmp_path, monkeypatch):
    memory, stream = memory_and_stream
    # Three batches at once: at the end of an epoch there are fewer.
    monkeypatch.setattr("bnn_jax.training.input_pipeline.BYTES_AT_ONCE", 3 * 8 * 28 * 28)
    train(memory, tmp_path / "memory")

    def stop_in_the_middle(done, total, text):
        if done == 13:
            raise Stop

    with pytest.raises(Stop):
        train(replace(stream, checkpoint_every_epochs=1), tmp_path / "stream", on_progress=stop_in_the_middle)
    train(stream, tmp_path / "stream")
    expected, found = what_it_left(tmp_path / "memory"), what_it_left(tmp_path / "stream")
    assert found[1] == expected[1]
    assert len(found[0]) == len(expected[0]) == 22
    for one, other in zip(*(records for records, _ in (found, expected))):
        assert one.pop("kind") == other.pop("kind")
        assert one == pytest.approx(other, rel=1e-6)
    results = [evaluate_run(tmp_path / name, split="train") for name in ("memory", "stream")]
    assert results[0] == pytest.approx(results[1], rel=1e-6)
    assert results[1]["examples"] == 86


@pytest.mark.full
def test_corrupt_images_are_told_and_left_out_or_refused(tmp_path):
    options = {"train_examples": 60, "validation_examples": 20, "classes": 3, "grey": 0.1, "cmyk": 0.1}
    write_synthetic_imagenet(tmp_path, short_side=(16, 40), **options)
    data = DataConfig(
        "imagenet2012", str(tmp_path), 10, stream=True, preprocessing="random_resized_crop", image_size=8, flip=True,
        lighting_std=0.1,
    )  # fmt: skip
    config = replace(CONFIG, data=data, epochs=1)
    with pytest.warns(SkippedExampleWarning) as told:
        result = train(replace(config, epochs=2), tmp_path / "run")
    pattern = r"skipped example \d+ of the (train|validation|test) split \((\d) corrupt so far\): record \d+ of "
    found = [re.match(pattern, str(warning.message)) for warning in told]
    assert [int(match[2]) for match in found] == [1, 2]  # one in each official split, told once
    assert 0 <= result["test_accuracy_last"] <= 1
    with pytest.raises(RunError, match="is corrupt"):
        train(config, tmp_path / "strict", strict=True)


@pytest.mark.full
def test_bfloat16_is_for_activations_alone(memory_and_stream, tmp_path):
    memory, _ = memory_and_stream
    for precision in ("float32", "bfloat16"):
        train(replace(memory, precision=precision), tmp_path / precision)
    (records, leaves), (rounded, leaves_16) = (what_it_left(tmp_path / name) for name in ("float32", "bfloat16"))
    assert [(leaf["name"], leaf["dtype"]) for leaf in leaves] == [(leaf["name"], leaf["dtype"]) for leaf in leaves_16]
    losses, losses_16 = ([r["loss"] for r in found if r["kind"] == "train"] for found in (records, rounded))
    assert losses != losses_16
    np.testing.assert_allclose(np.mean(losses), np.mean(losses_16), rtol=0.1)
