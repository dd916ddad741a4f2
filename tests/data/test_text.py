"""Texts as sets: windows of bytes and the byte behind each, split by place; what cannot be one is refused."""

import re

import numpy as np
import pytest

import bnn_jax
from bnn_jax.data import load_dataset, text_of, tokens_of
from bnn_jax.data.text import package_text
from bnn_jax.errors import UsageError


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "poem.txt"
    path.write_bytes(bytes(range(256)) * 2)
    return path


def test_labels_are_the_bytes_behind_each_and_no_windows_overlap(text):
    found = load_dataset(str(text), tokens=10)
    assert (found.name, found.num_classes, found.image_shape) == ("poem", 256, (10, 1, 1))
    assert (found.mean, found.std, found.note) == ((0.0,), (1.0,), "poem.txt, 512 bytes")
    assert [len(split) for split in (found.train, found.validation, found.test)] == [41, 5, 5]
    images = np.concatenate([split.images for split in (found.train, found.validation, found.test)]).ravel()
    labels = np.concatenate([split.labels for split in (found.train, found.validation, found.test)]).ravel()
    np.testing.assert_array_equal(images, np.arange(510) % 256)
    np.testing.assert_array_equal(labels, np.arange(1, 511) % 256)
    assert len(load_dataset(str(text), tokens=10, validation_examples=7).train) == 39


@pytest.mark.full
def test_the_packages_own_text_is_the_same_every_time_and_is_its_docstrings():
    text = package_text()
    assert text == package_text() and bnn_jax.BinaryConv.__doc__.splitlines()[0].encode() in text
    assert len(text) > 200_000
    tokens = tokens_of("häm")
    assert tokens.tolist() == [[104, 195, 164, 109]] and text_of(tokens[0]) == "häm" and text_of([255]) == "\ufffd"


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        (
            None,
            {"tokens": 200},
            "`tokens` (=200) must leave a window for each split of the 512 bytes of the text; give",
        ),
        (None, {"tokens": 0}, "`tokens` (=0) must be a whole number, at least 1"),
        (None, {"tokens": 10, "validation_examples": 46}, "`validation_examples` (=46) must be at most 45, so that"),
        (None, {"split_seed": 5}, "`split_seed` (=5) is for sets that are divided at random, and of "),
        (None, {"data_dir": "x"}, "`data_dir` (='x') is for sets stored in folders"),
        ("digits", {"tokens": 8}, "`tokens` (=8) is for texts, not 'digits'; leave it out"),
        ("nowhere.txt", {}, "`name` (='nowhere.txt') is not a file; give 'text', or the path of a .txt file"),
    ],
)
def test_what_is_no_text_is_refused(text, name, options, message):
    with pytest.raises(UsageError, match=re.escape(message)):
        load_dataset(name or str(text), **options)
