"""Own data, as users have them: folders of images, arrays of all kinds, rows, and what is wrong with them."""

import json
import re

import numpy as np
import pytest
from PIL import Image

from bnn_jax.data import Dataset, Split, load_dataset
from bnn_jax.data.arrays import ConvertedDataWarning, SuspectDataWarning
from bnn_jax.errors import RunError, UsageError
from bnn_jax.sweeps.comparison import compare, sweep
from bnn_jax.training.config import Config, ModelConfig, OptimConfig
from bnn_jax.training.evaluation import evaluate_run
from bnn_jax.training.loop import train

MLP = ModelConfig("mnist_mlp", width=8, options={"hidden_layers": 1})
CONFIG = Config("mine", 1, 16, loss="cross_entropy", model=MLP, optim=OptimConfig("adam", 0.01))


def bars(count, *, classes=4, size=8, seed=0):
    """Grey images of a bright bar, whose place tells the class."""
    rng = np.random.default_rng(seed)
    labels = np.arange(count) % classes
    images = rng.integers(0, 60, (count, size, size), dtype=np.uint8)
    for image, label in zip(images, labels):
        place = int(label * size / classes)
        image[:, place : place + 2] += 150
    return images, labels


X, Y = bars(200)


def write_pets(folder):
    """Photographs of two kinds and several sizes and formats, some of them grey."""
    for index, (image, label) in enumerate(zip(*bars(60, classes=2, size=24))):
        path = folder / ("cat", "dog")[label] / f"{index}.{('png', 'jpg', 'bmp')[index % 3]}"
        path.parent.mkdir(parents=True, exist_ok=True)
        picture = Image.fromarray(image[: 16 + index % 7])
        (picture if index % 4 else picture.convert("RGB")).save(path)
    return folder


@pytest.mark.full
def test_a_folder_of_images_goes_from_train_to_evaluate_by_commands(wheel, tmp_path):
    write_pets(tmp_path / "pets")
    data = ("--data.name", "pets", "--data.preprocessing", "center_crop", "--data.image-size", "8")
    size = ("--model.name", "mnist_mlp", "--model.width", "8", "--epochs", "1", "--batch-size", "16")
    done = wheel.run("train", "--config", "digits_xnor", *data, *size, "--workdir", "run", cwd=tmp_path)
    assert "test accuracy" in done.stdout
    recorded = json.loads((tmp_path / "run" / "data.json").read_text())
    assert recorded["class_names"] == ["cat", "dog"] and recorded["shape"] == [8, 8, 3]
    assert recorded["note"] == "pets (folder of images, BMP/JPEG/PNG; center_crop to 8x8); split 60/20/20 % by seed"
    done = wheel.run("evaluate", "run", cwd=tmp_path)
    assert re.match(r"test: accuracy \d+\.\d+ %.* on 12 examples", done.stdout)


@pytest.mark.full
def test_arrays_in_memory_train_and_another_call_is_refused(tmp_path):
    result = train(CONFIG, tmp_path / "run", data=(X, Y))
    assert train(CONFIG, tmp_path / "run", data=(X, Y)) == result
    found = evaluate_run(tmp_path / "run", data=(X, Y))
    assert found["accuracy"] == pytest.approx(result["test_accuracy_best"]) and found["examples"] == 40
    refused = (
        r"`data.name` is 'digits' now, but .*run holds a run with 'arrays in memory, sha256 \w{16}'; choose another"
    )
    with pytest.raises(UsageError, match=refused):
        train(CONFIG, tmp_path / "run")
    with pytest.raises(
        UsageError, match=r"`data.name` is 'arrays in memory, .*' now, but .* 'arrays in memory, sha256"
    ):
        train(CONFIG, tmp_path / "run", data=(255 - X, Y))
    split = lambda count: Split(np.zeros((count, 8, 8, 1), np.uint8), np.arange(count, dtype=np.int32) % 10)
    by_hand = Dataset("by hand", split(100), split(20), split(30), 10, (0.0,), (1.0,))
    with pytest.raises(
        UsageError, match=r"`data.name` is 'by hand in memory, sha256 \w{16}' now, but .* 'arrays in memory"
    ):
        train(CONFIG, tmp_path / "run", data=by_hand)
    with pytest.raises(UsageError, match=r"stands for arrays that a run was given; give them again, as `data`"):
        evaluate_run(tmp_path / "run")
    rows = dict.fromkeys(("first", "second"), CONFIG)
    compared = compare(rows, tmp_path / "compare", seeds=[0], data=(X, Y), execution="sequential")
    swept = sweep(CONFIG, {"optim.learning_rate": [0.01]}, tmp_path / "sweep", seeds=[0], data=(X, Y))
    for results in (compared, swept):
        assert results.datasets[0]["note"] == "arrays in memory; split 60/20/20 % by seed"
        assert results.rows[0].runs[0]["test_accuracy_best"] == result["test_accuracy_best"]
    with pytest.raises(UsageError, match=refused.replace("run holds", "first.seed0 holds")):
        compare(rows, tmp_path / "compare", seeds=[0])


def test_files_as_other_libraries_write_them(tmp_path):
    np.savez(tmp_path / "keras.npz", x_train=X[:160], y_train=Y[:160], x_test=X[160:], y_test=Y[160:])
    keras = load_dataset(str(tmp_path / "keras.npz"))
    assert (len(keras.train), len(keras.validation), len(keras.test)) == (144, 16, 40)
    np.savez(tmp_path / "plain.npz", images=X, labels=Y)
    assert len(load_dataset(str(tmp_path / "plain.npz")).test) == 40
    np.savez(tmp_path / "bare.npz", X, Y)
    with pytest.raises(
        RunError, match=r"it has arr_0, arr_1; name them: np.savez\(path, images=arr_0, labels=arr_1\)$"
    ):
        load_dataset(str(tmp_path / "bare.npz"))


def given(tmp_path, images, labels):
    """A set read from a file, which is checked as arrays in memory are."""
    np.savez(tmp_path / "mine.npz", images=images, labels=labels)
    return load_dataset(str(tmp_path / "mine.npz"))


@pytest.mark.parametrize(
    ("images", "labels", "said"),
    [
        ((X / 255).astype(np.float32), Y, "images as np.round(255 * images).astype(np.uint8)"),
        ((X / 127.5 - 1).astype(np.float32), Y, "images as np.round(127.5 * (images + 1)).astype(np.uint8)"),
        (X.astype(np.uint16) * 257, Y, "images as (images >> 8).astype(np.uint8)"),
        (X > 99, Y, "images as 255 * images.astype(np.uint8)"),
        (X, np.eye(4)[Y], "labels as labels.argmax(1)"),
        (X, Y[:, None], "labels as labels[:, 0]"),
    ],
    ids=["0 to 1", "-1 to 1", "uint16", "bool", "one-hot", "column"],
)
def test_what_is_clear_is_taken_and_said(tmp_path, images, labels, said):
    with pytest.warns(ConvertedDataWarning, match=rf"mine.npz is taken with {re.escape(said)}$"):
        found = given(tmp_path, images, labels)
    if images.dtype != bool:
        expected = given(tmp_path, X, Y)
        np.testing.assert_array_equal(found.train.images, expected.train.images)
        np.testing.assert_array_equal(found.train.labels, expected.train.labels)


@pytest.mark.parametrize(
    ("images", "labels", "message"),
    [
        ((X - 127.0) / 50, Y, r"images are uint8, .*: give np.round\(255 \* np.clip\(\(images \+ 2.54\) / "),
        (X.astype(np.uint16) * 16, Y, r"images are uint8, .*: give \(images >> 4\).astype\(np.uint8\)$"),
        (X, Y + 1, r"`labels` of .* has the labels 1, 2, 3, 4; classes are 0 to 3: give labels - 1$"),
        (
            X,
            2 * Y,
            r"has the labels 0, 2, 4, 6; classes are 0 to 3: give np.searchsorted\(np.unique\(labels\), labels\)",
        ),
        (X, np.where(Y == 3, 255, Y), r"has the labels 0, 1, 2, 255; .*: give images\[labels != 255\] and labels\["),
        (np.stack([X] * 3, axis=1), Y, r"as if the channels came first: give images.transpose\(0, 2, 3, 1\), or"),
    ],
    ids=["standardized", "12 bits", "from 1", "gaps", "255", "channels first"],
)
def test_what_is_wrong_is_refused_with_what_mends_it(tmp_path, images, labels, message):
    with pytest.raises(RunError, match=message):
        given(tmp_path, images, labels)


def test_what_may_be_wrong_is_warned_of(tmp_path):
    mine = {"x_train": X[Y != 3], "y_train": Y[Y != 3], "x_test": X, "y_test": Y, "num_classes": 4}
    np.savez(tmp_path / "mine.npz", **mine)
    with pytest.warns(SuspectDataWarning, match=r"`y_train` of .*mine.npz has 3 of 4 classes, none of 3: if those"):
        load_dataset(str(tmp_path / "mine.npz"))
    small = np.random.default_rng(0).integers(0, 256, (200, 3, 3, 32), dtype=np.uint8)
    with pytest.warns(SuspectDataWarning, match=r"3x3 pixels with 32 channels; if the channels came first give"):
        given(tmp_path, small, Y)


@pytest.mark.parametrize("url", ["gs://bucket/mine", "s3://bucket/mine"])
def test_a_bucket_is_refused_in_one_sentence(url, tmp_path):
    rule = (
        r" \(='\w+://bucket/mine'\) is a URL, and only this machine's file system is read and written; mount the bucket"
    )
    for argument, call in (
        ("workdir", lambda: train(CONFIG, url, data=(X, Y))),
        ("data", lambda: train(CONFIG, tmp_path, data=url)),
        ("name", lambda: load_dataset(url)),
        ("data_dir", lambda: load_dataset("pets", data_dir=url)),
    ):
        with pytest.raises(UsageError, match=f"`{argument}`{rule}"):
            call()
