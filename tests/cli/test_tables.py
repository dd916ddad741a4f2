"""bnn-jax list: every entry of every table has its line, and every published one its paper."""

import pytest
from run_script import run_command

from bnn_jax.cli.tables import DATA, rows_of
from bnn_jax.data.prepare import ARCHIVES
from bnn_jax.estimators import ESTIMATORS
from bnn_jax.losses import LOSSES
from bnn_jax.models import MODELS
from bnn_jax.optim import OPTIMIZERS
from bnn_jax.quantizers import ACTIVATION_QUANTIZERS, GRADIENT_QUANTIZERS, WEIGHT_QUANTIZERS
from bnn_jax.zoo import PRETRAINED

TABLES = {
    "models": [*MODELS],
    "quantizers": [*WEIGHT_QUANTIZERS, *ACTIVATION_QUANTIZERS, *GRADIENT_QUANTIZERS],
    "estimators": [*ESTIMATORS],
    "optimizers": [*OPTIMIZERS],
    "losses": [*LOSSES],
    "data": [*DATA],
    "pretrained": [*PRETRAINED],
}
UNPUBLISHED = {"full_precision", "text", "NAME", "FILE.npz", "FILE.txt", "FOLDER"}


@pytest.mark.parametrize("what", TABLES)
def test_every_entry_has_a_line_and_its_paper(what):
    rows = rows_of(what)
    assert [row[0] for row in rows] == TABLES[what]
    for name, *_, line, paper in rows:
        advice = (
            f"{name} is listed by the first line of its function's docstring, and by the line `Reference: ...` there"
        )
        assert len(line) > 12 and "\n" not in line and ":func:" not in line, advice
        # A technical report and a poster have no year.
        dated = any(word in paper for word in (*map(str, range(1980, 2030)), "TU Delft", "Stanford"))
        assert dated or name in UNPUBLISHED or (what == "pretrained" and paper in MODELS), advice


def test_papers_are_those_of_the_entry():
    papers = {row[0]: row[-1] for what in ("models", "estimators", "optimizers") for row in rows_of(what)}
    assert papers["tbn_resnet18"].startswith("Wan et al., TBN")
    assert papers["ste_sign"].startswith("Hubara et al.")
    assert papers["dfw"].startswith("Berrada, Zisserman, Kumar, Deep Frank-Wolfe")
    quantizers = {(name, place): (line, paper) for name, place, line, paper in rows_of("quantizers")}
    assert quantizers["approx_sign", "inputs"][1].startswith("Liu et al., Bi-Real Net")
    assert quantizers["ttq", "weights"][1].startswith("Zhu et al., Trained Ternary Quantization")


def test_every_set_that_can_be_prepared_is_listed():
    assert set(ARCHIVES) <= set(DATA)


@pytest.mark.parametrize("what", ["quantizers", "data", "pretrained"])
def test_a_table_at_80_columns(what, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    printed = run_command("list", what).stdout
    assert max(map(len, printed.splitlines())) <= 80 and "…" not in printed
    for name in TABLES[what]:
        assert f" {name} " in printed


def test_every_column_has_a_name():
    header = run_command("list", "losses", "--format", "csv").stdout.splitlines()[0]
    assert header == "name,description,paper"


def test_another_table_is_refused():
    assert "optimizers" in run_command("list", "optimisers", code=2).stderr
