"""Arrays in memory: every form in which they are given, and the name by which a run knows them again."""

import re
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image
from small_sets import brightness_set, contents, same_splits

from bnn_jax.data import Dataset, Split, as_dataset, load_dataset
from bnn_jax.data.arrays import ConvertedDataWarning, SuspectDataWarning
from bnn_jax.errors import RunError, UsageError
from bnn_jax.sweeps.comparison import compare, sweep
from bnn_jax.sweeps.engine import Run, run_all
from bnn_jax.training.config import Config, DataConfig, ModelConfig, OptimConfig
from bnn_jax.training.data_record import data_of_run
from bnn_jax.training.input_pipeline import load_data, with_data
from bnn_jax.training.loop import train, train_together
from bnn_jax.training.run_folder import check_workdir, claim_workdir

RANDOM = np.random.default_rng(0)
X, Y = RANDOM.integers(0, 256, (50, 6, 5, 3), dtype=np.uint8), np.arange(50, dtype=np.int32) % 5
CONFIG = Config("mine", 1, 4, model=ModelConfig("resnet6", width=4), optim=OptimConfig("adam", 0.01))


def rows(images, labels):
    return [{"image": Image.fromarray(image), "label": int(label)} for image, label in zip(images, labels)]


class Rows:
    """A sequence that is no list, as a set of Hugging Face."""

    def __init__(self, images, labels):
        self._rows = rows(images, labels)

    def __len__(self):
        return len(self._rows)

    def __getitem__(self, index):
        return self._rows[index]


class Pairs(Rows):
    """A set of torchvision."""

    def __getitem__(self, index):
        return tuple(self._rows[index].values())


HALVES = (X[:40], Y[:40]), (X[40:], Y[40:])
FORMS = {
    "pairs of Keras": HALVES,
    "lists": [(X[:40].tolist(), Y[:40].tolist()), (X[40:].tolist(), Y[40:].tolist())],
    "splits": {"train": HALVES[0], "test": HALVES[1]},
    "Split": {"train": Split(*HALVES[0]), "test": Split(*HALVES[1])},
    "rows of PyTorch": {"train": Pairs(*HALVES[0]), "test": Pairs(*HALVES[1])},
    "lists of PyTorch's rows": {"train": list(zip(*HALVES[0])), "test": tuple(zip(*HALVES[1]))},
    "rows": {"train": rows(*HALVES[0]), "test": Rows(*HALVES[1])},
    "arrays": {"x_train": X[:40], "y_train": Y[:40], "x_test": X[40:], "y_test": Y[40:]},
}


@pytest.mark.filterwarnings("ignore::bnn_jax.data.arrays.ConvertedDataWarning")
def test_every_form_is_the_same_set():
    made = [as_dataset(data) for data in FORMS.values()]
    assert len({dataset.identity["name"] for dataset in made}) == 1
    for dataset in made:
        assert same_splits(dataset, made[0])
        assert contents(dataset.train, dataset.validation) == contents(Split(X[:40], Y[:40]))
        assert (len(dataset.train), len(dataset.validation), len(dataset.test)) == (36, 4, 10)


@pytest.mark.parametrize(
    "data",
    [(X, Y), rows(X, Y), list(zip(X, Y)), {"images": X, "labels": Y}],
    ids=["pair", "rows", "tuples", "dict"],
)
def test_one_split_is_divided_of_each_class(data):
    dataset = as_dataset(data)
    splits = (dataset.train, dataset.validation, dataset.test)
    assert [np.bincount(split.labels).tolist() for split in splits] == [[6] * 5, [2] * 5, [2] * 5]
    assert contents(*splits) == contents(Split(X, Y))
    assert dataset.note == "arrays in memory; split 60/20/20 % by seed"
    assert len(as_dataset(data, validation_examples=15).train) == 25
    assert not same_splits(dataset, as_dataset(data, split_seed=1))


def test_rows_of_images_of_any_size_and_mode():
    features = {"label": type("ClassLabel", (), {"names": ["a", "b", "c", "d", "e"]})}
    many = type("WithFeatures", (Rows,), {"features": features})(X, Y)
    many._rows[3]["image"] = many._rows[3]["image"].convert("L").resize((8, 9))
    with pytest.raises(
        UsageError, match=r"cannot be one array .*, or images of Pillow with `data.preprocessing` center_"
    ):
        as_dataset(many)
    config = replace(CONFIG, data=DataConfig(preprocessing="center_crop", image_size=4))
    named, dataset = with_data(config, many)
    assert dataset.image_shape == (4, 4, 3) and dataset.class_names == ("a", "b", "c", "d", "e")
    assert (named.data.preprocessing, named.data.image_size) == ("center_crop", 4)
    with pytest.raises(
        UsageError, match=r"`data.preprocessing` is for image files and images of Pillow; arrays have one s"
    ):
        with_data(config, (X, Y))


def with_classes(*names):
    return type("WithClasses", (Pairs,), {"classes": list(names)})


def test_splits_that_number_their_classes_otherwise_are_refused():
    one, other = with_classes(*"abcde"), with_classes(*"abced")
    assert as_dataset({"train": one(*HALVES[0]), "test": one(*HALVES[1])}).class_names == tuple("abcde")
    message = r"`test` of `data` has the classes a, b, c, e, d, `train` a, b, c, d, e; number them alike$"
    with pytest.raises(UsageError, match=message):
        as_dataset({"train": one(*HALVES[0]), "test": other(*HALVES[1])})
    many, more = with_classes(*range(1000)), with_classes(*range(998), 7)
    message = r"`test` of `data` has the classes ..., 7, `train` ..., 998, 999; number them alike$"
    with pytest.raises(UsageError, match=message):
        as_dataset({"train": many(*HALVES[0]), "test": more(*HALVES[1])})


def test_images_of_pillow_of_16_bits():
    values = np.random.default_rng(1).integers(0, 65536, (50, 6, 5)).astype(np.uint16)
    images = [Image.fromarray(image) for image in values]
    dataset = as_dataset({"train": (images, Y), "test": ([Image.fromarray(image >> 8) for image in values], Y)})
    assert contents(dataset.train, dataset.validation) == contents(Split((values >> 8).astype(np.uint8)[..., None], Y))
    with pytest.raises(RunError, match=r"images of `data` have no value above 409\d, .*, \(pixels >> 4\).astype\(np.u"):
        as_dataset(([Image.fromarray(image >> 4) for image in values], Y))
    with pytest.raises(RunError, match=r"no value above 255, and the upper 8 of .* 8 bits, pixels.astype\(np.uint8\)$"):
        as_dataset(([Image.fromarray(image >> 8) for image in values], Y))


def test_a_validation_split_alone_is_the_test_split():
    dataset = as_dataset({"train": HALVES[0], "val": HALVES[1]})
    np.testing.assert_array_equal(dataset.test.images, X[40:])
    assert dataset.note.endswith("tested on the validation split")
    three = as_dataset((HALVES[0], HALVES[1], (X[:5], Y[:5])))
    np.testing.assert_array_equal(three.validation.images, X[40:])


@pytest.mark.parametrize(
    ("data", "error", "message"),
    [
        (
            X,
            UsageError,
            r"`data` \(a ndarray\) must be \(images, labels\), \(\(x_train, y_train\), \(x_test, y_test\)\)",
        ),
        ([HALVES[0]] * 4, UsageError, r"`data` \(a list of 4 tuples\) must be \(images, labels\), \(\(x_train,"),
        ((X,), UsageError, r"`data` \(a tuple\) must be \(images, labels\)"),
        (
            {"train": HALVES[0], "holdout": HALVES[1]},
            UsageError,
            r"`data` \(='holdout'\) is not known; .* one of: test",
        ),
        (
            (X.transpose(0, 3, 1, 2), Y),
            RunError,
            r"`images` of `data` has shape .*: give images.transpose\(0, 2, 3, 1\)",
        ),
        ((X, Y + 1), RunError, r"`labels` of `data` has the labels 1, 2, 3, 4, 5; .* 0 to 4: give labels - 1$"),
        (
            ([X[0], X[1, :2]], [0, 1]),
            UsageError,
            r"`images` of `data` cannot be one array \(.*\); give arrays of one shape",
        ),
        (
            [{"picture": X[0], "label": 0}],
            UsageError,
            r"`data` has a row without 'image'; rows have an image and a label",
        ),
        (
            {"train": HALVES[0], "val": HALVES[1], "validation": HALVES[1]},
            UsageError,
            r"`data` has the same under two names, `val` and `validation`; leave one out",
        ),
        (
            [{"image": Image.new("F", (5, 6)), "label": 0}],
            UsageError,
            r"image 0 of `data` cannot be taken: its pixels are floats; store 8 or 16 bits",
        ),
        (
            [{"image": Image.fromarray(np.full((6, 5), -1, np.int32)), "label": 0}],
            UsageError,
            r"image 0 of `data` cannot be taken: its pixels have more than 16 bits; store 8 or 16",
        ),
        (
            [*rows(X[:1], Y[:1]), {"image": None, "label": 0}],
            UsageError,
            r"`images` of `data` has a NoneType at index 1, others are images of Pillow; give one",
        ),
        ((X[:6], Y[:6]), UsageError, r"the set has too few examples of its classes to be divided; give validation and"),
    ],
)
def test_what_is_no_set_is_refused(data, error, message):
    with pytest.raises(error, match=message):
        as_dataset(data)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"split_seed": -1}, r"`data.split_seed` \(=-1\) must be a whole number, at least 0"),
        ({"validation_examples": 10.5}, r"`data.validation_examples` \(=10.5\) must be a whole number, at least 1"),
    ],
)
def test_numbers_that_cannot_divide_are_named_as_the_config_has_them(settings, message):
    with pytest.raises(UsageError, match=message):
        with_data(replace(CONFIG, data=DataConfig(**settings)), (X, Y))


def test_a_set_made_by_hand_is_checked_like_the_rest():
    mine = Dataset("mine", Split(*HALVES[0]), Split(*HALVES[1]), Split(X[:5], Y[:5]), 5, (127.0,) * 3, (70.0,) * 3)
    found = as_dataset(mine)
    assert found.mean == (127.0,) * 3 and same_splits(found, mine)
    assert re.fullmatch(r"mine in memory, sha256 \w{16}", found.identity["name"]) and mine.identity is None
    with pytest.raises(
        RunError, match=r"`train_labels` of `data` \(mine\) has the label 4 at index 4; labels are 0 to 3"
    ):
        as_dataset(replace(mine, num_classes=4))
    with pytest.warns(SuspectDataWarning, match=r"has 5 of 6 classes, none of 5"):
        as_dataset(replace(mine, num_classes=6))
    with pytest.raises(
        UsageError, match=r"`std` \(=\(0, 1, 1\)\) of `data` must be 3 numbers, one for each channel, std"
    ):
        as_dataset(replace(mine, std=(0, 1, 1)))


def test_a_set_made_by_hand_of_images_in_another_unit_is_refused():
    mine = Dataset("mine", Split(*HALVES[0]), Split(*HALVES[1]), Split(X[:5], Y[:5]), 5, (127.0,) * 3, (70.0,) * 3)
    whole = replace(mine, train=Split(X[:40].astype(np.int64), Y[:40]))
    with pytest.warns(ConvertedDataWarning, match=r"train_images as train_images.astype\(np.uint8\)"):
        assert same_splits(as_dataset(whole), mine)
    shares = replace(mine, train=Split(X[:40] / 255, Y[:40]))
    message = r"`train_images` of `data` \(mine\) is float64, and `mean` and `std` are those of 0..255: give uint8"
    with pytest.warns(ConvertedDataWarning), pytest.raises(UsageError, match=message):
        as_dataset(shares)


def test_a_set_of_tokens_made_by_hand(tmp_path):
    (tmp_path / "mine.txt").write_text("a text of many words, " * 9)
    mine = replace(load_dataset(str(tmp_path / "mine.txt"), tokens=8), name="mine")
    assert as_dataset(mine).identity["name"].startswith("mine in memory, sha256")
    with pytest.raises(
        UsageError, match=r"`train_labels` of `data` \(mine\) has labels from 0 to 121; they are 0 to 9"
    ):
        as_dataset(replace(mine, num_classes=10))
    config = replace(CONFIG, data=DataConfig(crop_padding=1))
    with pytest.raises(UsageError, match=r"`data.crop_padding` \(=1\) is for images, and mine in memory.* is a text"):
        train(config, tmp_path / "run", data=mine)


def test_a_loaded_set_keeps_its_name_and_a_changed_one_loses_it():
    digits = load_dataset("digits", split_seed=3)
    config, dataset = with_data(CONFIG, digits)
    assert dataset is digits and config == replace(CONFIG, data=DataConfig(split_seed=3))
    assert same_splits(load_data(config.data), digits)
    fewer = replace(digits, train=Split(digits.train.images[:100], digits.train.labels[:100]))
    assert re.fullmatch(r"digits in memory, sha256 \w{16}", with_data(CONFIG, fewer)[0].data.name)
    with pytest.raises(ValueError, match="read-only"):
        digits.train.images[0] = 0


def test_each_array_is_of_the_identity():
    names = [with_data(CONFIG, (X, Y))[0].data.name]
    for change in ((255 - X, Y), (X, (Y + 1) % 5), (X[:, ::-1], Y), (X[:-1], Y[:-1])):
        names.append(with_data(CONFIG, change)[0].data.name)
    names.append(with_data(replace(CONFIG, data=DataConfig(split_seed=1)), (X, Y))[0].data.name)
    assert len(set(names)) == 6


def test_a_later_call_without_them_or_with_others_is_refused(tmp_path):
    config, _ = with_data(CONFIG, (X, Y))
    claim_workdir(config, tmp_path)
    (tmp_path / "result.json").write_text("{}")
    for other in (None, (255 - X, Y), "digits"):
        asked, _ = with_data(CONFIG, other)
        with pytest.raises(
            UsageError,
            match=r"`data.name` is .* now, but .* holds a run with 'arrays in memory, sha256 \w{16}'; choose",
        ):
            check_workdir(asked, tmp_path)
    check_workdir(with_data(CONFIG, (X, Y))[0], tmp_path)
    assert len(data_of_run(tmp_path, config, (X, Y)).test) == 10
    with pytest.raises(
        UsageError, match=r"`data` is 'arrays in memory, .*', but the run was trained on 'arrays in mem"
    ):
        data_of_run(tmp_path, config, (255 - X, Y))
    with pytest.raises(
        UsageError, match=r"`data.name` \(='arrays in memory, .*'\) stands for arrays that a run was given; give them"
    ):
        data_of_run(tmp_path, config, None)


@pytest.fixture
def stopped(monkeypatch):
    """Runs end before their first step."""

    class Stopped(Exception):
        pass

    def stop(*_):
        raise Stopped

    monkeypatch.setattr("bnn_jax.training.loop.resume", stop)
    return pytest.raises(Stopped)


@pytest.mark.parametrize(
    "start",
    [
        lambda folder: train(CONFIG, folder / "run", data=(X, Y)),
        lambda folder: train_together([CONFIG], [folder / "run"], data=(X, Y)),
        lambda folder: compare({"run": CONFIG}, folder, seeds=[0], data=(X, Y)),
        lambda folder: sweep(CONFIG, {"optim.learning_rate": [0.01]}, folder, seeds=[0], data=(X, Y)),
    ],
    ids=["train", "train_together", "compare", "sweep"],
)
def test_every_way_to_train_takes_them(tmp_path, stopped, start):
    with stopped:
        start(tmp_path)
    (recorded,) = tmp_path.rglob("config.json")
    assert with_data(CONFIG, (X, Y))[0].data.name in recorded.read_text()


def test_processes_do_not_take_what_is_in_memory(tmp_path):
    config, dataset = with_data(CONFIG, (X, Y))
    with pytest.raises(
        UsageError, match=r"`execution` \(='processes'\) is for data on disk, .*; save these as an .npz"
    ):
        run_all([Run("run", config, tmp_path)], execution="processes", datasets={config.data: dataset})


def test_a_hand_made_set_does_not_pass_for_the_one_of_the_config():
    assert with_data(CONFIG, brightness_set(30))[0].data.name.startswith("synthetic in memory")
