"""A user's text: a language model trained on it from a command, packed, and asked for more."""

import re

import pytest

pytestmark = pytest.mark.full

ASK = """
import bnn_jax
from bnn_jax.data import in_batches

run = bnn_jax.load_run("run")
packed = run.freeze()
print("trained", run.result["test_perplexity_best"])
print("packed", packed.perplexity(in_batches(run.dataset.test, 100)))
"""


def test_a_language_model_of_ones_own_text(wheel, tmp_path):
    (tmp_path / "mine.txt").write_text("the quick brown fox jumps over the lazy dog. " * 100)
    small = ["--model.width", 32, "--model.options", "depth", 1, "--batch-size", 8, "--epochs", 12]
    options = ["--config", "text_bitnet", "--data.name", "mine.txt", "--data.tokens", 32, *small]
    done = wheel.run("train", *options, "--workdir", "run", cwd=tmp_path)
    assert re.search(r"test perplexity [\d.]+ and [\d.]+", done.stdout)
    asked = ["--prompt", "the quick ", "--count", 20, "--temperature", 0]
    assert wheel.run("sample", "run", *asked, cwd=tmp_path).stdout.startswith("the quick brown fox")
    told = dict(line.split(" ", 1) for line in wheel.python("-c", ASK, cwd=tmp_path).stdout.splitlines())
    assert float(told["trained"]) == pytest.approx(float(told["packed"]), rel=1e-6)
    assert float(told["trained"]) < 1.6
