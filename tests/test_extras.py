"""Packages that one purpose needs: the extras of setup.cfg, and what is said where one of them is missing."""

import configparser
import re
import sys
from pathlib import Path

import pytest

from bnn_jax.analysis.figures import drawing
from bnn_jax.data.prepare import import_tfds
from bnn_jax.errors import UsageError
from bnn_jax.extras import EXTRAS, import_extra

ROOT = Path(__file__).parents[1]


def requirements():
    """extra -> the packages that it installs, as they are imported; "" -> those that are always installed."""
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    lists = {"": setup["options"]["install_requires"], **setup["options.extras_require"]}
    return {
        extra: {re.split(r"[;<>=\[]", line)[0].replace("-", "_") for line in text.split("\n") if line}
        for extra, text in lists.items()
    }


def test_every_package_is_installed_by_the_extra_that_is_named():
    wanted = requirements()
    assert {"stream", "tfds", "export", "plot", "tensorboard", "dev", "docs", "all"} <= set(wanted)
    for package, extra in EXTRAS.items():
        assert package in wanted[extra] and package not in wanted[""]


def test_the_chosen_packages_are_always_there_or_in_all():
    wanted = requirements()
    assert {"jax", "flax", "optax", "chex", "orbax_checkpoint"} <= wanted[""]
    assert "tensorflow_datasets" in wanted["tfds"]
    setup = (ROOT / "setup.cfg").read_text()
    assert "all =\n    bnn_jax[stream,tfds,export,keras,plot,tensorboard]" in setup
    assert "test =\n    bnn_jax[all]" in setup


@pytest.mark.parametrize("package", EXTRAS)
def test_a_missing_one_is_named_with_its_pip_line(package, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    words = rf"^it needs the Python package {package}, .*: pip install 'bnn_jax\[{EXTRAS[package]}\]'"
    with pytest.raises(UsageError, match=rf"{words}$"):
        import_extra(package, "it")
    with pytest.raises(UsageError, match=rf"{words}; or wait$"):
        import_extra(package, "it", "wait")


def test_where_they_are_needed(monkeypatch, tmp_path):
    for package in ("matplotlib", "tensorflow_datasets"):
        monkeypatch.setitem(sys.modules, package, None)
    with (
        pytest.raises(UsageError, match=r"drawing needs the Python package matplotlib"),
        drawing(tmp_path / "a", (1, 1)),
    ):
        pass
    with pytest.raises(UsageError, match=r"a set of TFDS needs the Python package tensorflow_datasets, .*\.npz file"):
        import_tfds()
