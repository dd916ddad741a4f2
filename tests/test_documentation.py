"""The documentation: its Python runs as it stands, its commands, paths and options are there."""

import ast
import os
import re
from dataclasses import replace

import jax
import pytest
from documentation_pages import PAGES, ROOT, commands_of, known_options, options_of, python_of, reader_files, refused
from PIL import Image

import bnn_jax

README = ROOT / "README.md"
WITH_PYTHON = [page for page in PAGES if python_of(page)]
TRAINING = [page for page in WITH_PYTHON if "bnn_jax.train(" in page.read_text()]
PATH = re.compile(r"`((?:scripts|configs|bnn_jax|results|constraints|tests)/[\w/.-]*\w)")
OF_OTHERS = {
    "recipes.md": {"--cos", "--data_aug"},
    "recovery.md": {"--xla_gpu_deterministic_ops=true"},
    "tpu.md": {"--xla_gpu_deterministic_ops=true"},
}
"""Options of other programs that the text of a page names."""


def named(page):
    return str(page.relative_to(ROOT))


def run_python(page):
    """Run the Python of a page, one block after another."""
    namespace = {"__name__": "__main__"}
    for block in python_of(page):
        code = compile("\n" * (block.line - 1) + block.text, str(page), "exec")
        if block.reason is None:
            exec(code, namespace)


@pytest.fixture
def as_users_have_it(monkeypatch):
    """Dtypes and ranks promote, and modules that a page defines are forgotten."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


def run_all(pages, tmp_path, monkeypatch):
    for page in pages:
        folder = tmp_path / named(page).replace("/", "_")
        reader_files(page, folder)
        monkeypatch.chdir(folder)
        with pytest.MonkeyPatch.context() as patch:
            patch.syspath_prepend(folder)
            run_python(page)


@pytest.mark.full
def test_python_of_the_readme_runs_with_runs_of_an_epoch(tmp_path, monkeypatch, as_users_have_it):
    train = bnn_jax.train
    monkeypatch.setattr(
        bnn_jax, "train", lambda config, *given, **options: train(replace(config, epochs=1), *given, **options)
    )
    run_all([README], tmp_path, monkeypatch)


@pytest.mark.full
def test_python_runs_as_it_stands(tmp_path, monkeypatch, as_users_have_it):
    run_all([page for page in WITH_PYTHON if page not in TRAINING], tmp_path, monkeypatch)


@pytest.mark.full
@pytest.mark.parametrize("page", TRAINING, ids=named)
def test_python_that_trains_runs_as_it_stands(page, tmp_path, monkeypatch, as_users_have_it):
    run_all([page], tmp_path, monkeypatch)


def test_commands_are_those_that_the_programs_take(tmp_path):
    refusals = {}
    for page in PAGES:
        folder = tmp_path / named(page).replace("/", "_")
        reader_files(page, folder)
        for command in commands_of(page):
            with pytest.MonkeyPatch.context() as patch:
                if why := refused(command, patch, folder):
                    refusals[named(page), command] = why
    assert not refusals, "\n".join(f"{page}: {command}\n{why}" for (page, command), why in refusals.items())


@pytest.mark.parametrize(
    ("command", "why"),
    [
        ("bnn-jax train --config digits_xnor --optim.learning-rat 0.1", "learning-rat"),
        ("bnn-jax train --config digits_xnor --optim.schedule cosin", "did you mean 'cosine'"),
        ("bnn-jax export runs/mine --to onnx", "onnx"),
        ("bnn-jax sweep --optim.learning-rate 0.1 -1", "must be positive"),
        ("bnn-jax explain", "(='explain') is not known"),
    ],
)
def test_what_a_program_does_not_take_is_found(command, why, tmp_path, monkeypatch):
    assert why in refused(command, monkeypatch, tmp_path)


@pytest.mark.parametrize("command", ["make tests", "pip install '.[everything]'", "python scripts/trian.py"])
def test_what_is_not_there_is_found(command, tmp_path, monkeypatch):
    assert refused(command, monkeypatch, tmp_path)


def test_options_in_the_text_are_known():
    known, unknown = known_options(), {}
    for page in PAGES:
        of_page = known | OF_OTHERS.get(page.name, set())
        unknown |= {option: named(page) for option in options_of(page) if option not in of_page}
    assert unknown == {}


def test_paths_in_the_text_are_there():
    missing = {}
    for page in PAGES:
        for path in re.findall(
            r"`((?:scripts|configs|bnn_jax|results|constraints|tests)/[\w/.-]*\w)", page.read_text()
        ):
            if not (ROOT / path).exists() and page.name != "recipes.md":
                missing[path] = named(page)
    assert missing == {}
    assert os.access(ROOT / ".ci" / "run", os.X_OK)


def test_the_readme_is_short_and_its_links_lead_somewhere():
    text = README.read_text()
    assert len(text.splitlines()) <= 130
    links = re.findall(r"\]\(([^)#]+)[^)]*\)", text)
    assert len(links) > 15
    assert [link for link in links if not (ROOT / link).exists()] == []


def test_the_picture_is_small_and_its_script_draws_it(tmp_path):
    assert (ROOT / "docs" / "_static" / "readme.png").stat().st_size < 60_000
    script = {"__name__": "picture", "__file__": str(ROOT / "docs" / "picture.py")}
    exec(compile((ROOT / "docs" / "picture.py").read_text(), "picture.py", "exec"), script)
    script["main"](tmp_path / "drawn.png")
    with Image.open(tmp_path / "drawn.png") as drawn, Image.open(ROOT / "docs" / "_static" / "readme.png") as committed:
        assert drawn.size == committed.size
    assert (tmp_path / "drawn.png").stat().st_size < 60_000


def test_blocks_that_are_not_run_say_why_and_are_few():
    reasons = [block.reason for page in PAGES for block in python_of(page) if block.reason]
    assert all(len(reason.split()) > 2 for reason in reasons)
    assert len(reasons) <= 6
    assert all(ast.parse(block.text) for page in PAGES for block in python_of(page))
