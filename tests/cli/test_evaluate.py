"""Evaluating a file on another set than its own: which of the settings of its own hold for that one."""

import numpy as np
import pytest

from bnn_jax.cli import evaluate
from bnn_jax.cli.evaluate import _load_other
from bnn_jax.errors import UsageError
from bnn_jax.training.config import DataConfig

IMAGES, LABELS = np.arange(50 * 16).reshape(50, 4, 4).astype(np.uint8), np.arange(50) % 5
OF_DIGITS = {"name": "digits", "validation_examples": 20, "split_seed": 3, "image_size": None, "tokens": None}
OF_FILES = OF_DIGITS | {"preprocessing": "center_crop", "image_size": 4, "stream": True}


@pytest.mark.parametrize("recorded", [OF_DIGITS, OF_FILES, {}])
def test_a_set_with_splits_of_its_own_keeps_them(tmp_path, recorded):
    parts = {"train": slice(30), "validation": slice(30, 40), "test": slice(40, 50)}
    arrays = {f"{name}_images": IMAGES[part] for name, part in parts.items()}
    np.savez(tmp_path / "own.npz", **arrays, **{f"{name}_labels": LABELS[part] for name, part in parts.items()})
    dataset = _load_other(str(tmp_path / "own.npz"), recorded, None)
    np.testing.assert_array_equal(dataset.test.images[..., 0], IMAGES[40:])
    with pytest.raises(UsageError, match=r"`data.data_dir` \(='d'\) is for sets stored in folders"):
        _load_other(str(tmp_path / "own.npz"), recorded, "d")


def test_a_set_that_was_moved_is_divided_as_before(tmp_path):
    np.savez(tmp_path / "moved.npz", images=IMAGES, labels=LABELS)
    found = [_load_other(str(tmp_path / "moved.npz"), recorded, None) for recorded in (OF_FILES, {})]
    assert [len(dataset.validation) for dataset in found] == [20, 10]
    assert not np.array_equal(found[0].test.images, found[1].test.images)


@pytest.mark.parametrize(
    ("name", "kept"),
    [
        ("a_folder", {"preprocessing": "center_crop", "image_size": 4, "stream": True}),
        ("text", {"tokens": 16}),
        ("mine.txt", {"tokens": 16}),
        ("digits", {}),
        ("mine.npz", {}),
    ],
)
def test_only_settings_that_are_of_such_data_are_kept(monkeypatch, name, kept):
    monkeypatch.setattr(evaluate, "load_data", lambda data: data)
    found = _load_other(name, OF_FILES | {"tokens": 16, "flip": True}, None)
    assert found == DataConfig(name, validation_examples=20, split_seed=3, **kept)
