"""A file imports only from stages above it in the data flow, and all that it uses."""

import ast
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

import bnn_jax

PACKAGE = Path(bnn_jax.__file__).parent
STAGES = (
    {"errors", "precision", "types"},
    {"paths"},
    {"names"},
    {"checks", "compilation", "cores", "extras", "files", "finite", "outputs", "timing"},
    {"schedules"},
    {"estimators"},
    {"quantizers"},
    {"bitops", "tracing"},
    {"layers"},
    {"models"},
    {"convert"},
    {"losses", "distillation", "regularizers"},
    {"optim"},
    {"data"},
    {"training"},
    {"stages", "sweeps"},
    {"packed"},
    {"zoo"},
    {"analysis"},
    {"run"},
    {"benchmarks"},
    {"cli"},
    {"__main__"},
)
RANK = {name: rank for rank, stage in enumerate(STAGES) for name in stage}
FILES = sorted(path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py")


def imported_stages(path):
    for node in ast.walk(ast.parse(path.read_text())):
        modules = [node.module] if isinstance(node, ast.ImportFrom) else []
        modules += [f"{node.module}.{a.name}" for a in node.names] if isinstance(node, ast.ImportFrom) else []
        modules += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        for module in modules:
            parts = (module or "").split(".")
            if parts[0] == "bnn_jax" and len(parts) > 1 and parts[1] in RANK:
                yield parts[1]


def stage_of(path):
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


def test_every_file_has_a_stage():
    assert {stage_of(path) for path in FILES} == set(RANK)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_upwards(path):
    own = stage_of(path)
    for stage in imported_stages(path):
        assert stage == own or RANK[stage] < RANK[own], f"{path} imports bnn_jax.{stage}"


def test_only_what_builds_converts_trains_and_packs_networks_imports_flax():
    users = {stage_of(path) for path in FILES if "import flax" in path.read_text()}
    assert users <= {"layers", "models", "convert", "training", "packed"}


def test_importing_the_package_is_light():
    """Heavy and optional packages are imported where they are used."""
    heavy = {"tensorflow_datasets", "matplotlib", "orbax", "sklearn", "PIL", "tensorflow", "rich"}
    for path in FILES:
        for node in ast.parse(path.read_text()).body:
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) and node.module else []
            assert not heavy & {name.split(".")[0] for name in names}, path


FOR_USERS = {"clipping_penalty", "read_results", "rotation_objective", "verify_checkpoint", "whole_run"}
"""What the package offers and does not call itself, beside the names of its `__all__`s."""


def test_nothing_is_there_for_tests_alone():
    defined, used = set(), set(FOR_USERS)
    scripts = [path for folder in ("scripts", "configs") for path in (PACKAGE.parent / folder).glob("*.py")]
    for path in [*PACKAGE.rglob("*.py"), *scripts]:
        tree = ast.parse(path.read_text())
        for node in ast.walk(tree):
            if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load):
                used.add(node.id)
            elif isinstance(node, ast.Attribute):
                used.add(node.attr)
        for node in tree.body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef) and path not in scripts:
                defined.add(node.name)
            elif isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
                used |= set(ast.literal_eval(node.value))
    assert defined - used == set()
    assert not FOR_USERS - defined


def test_every_name_is_defined():
    """What ruff is told to leave out, for it takes the shapes in annotations for names; those stand behind a quote."""
    options = ["--isolated", "--no-cache", "--select=F821", "--target-version=py311", "--output-format=json"]
    command = [sys.executable, "-m", "ruff", "check", *options, PACKAGE.parent]
    found = subprocess.run(command, capture_output=True, text=True).stdout
    shapes, others = [], []
    for finding in json.loads(found):
        place, path = finding["location"], Path(finding["filename"])
        before = path.read_text().splitlines()[place["row"] - 1][: place["column"] - 1]
        is_shape = re.search(r"[\"'][\w *]*$", before)
        (shapes if is_shape else others).append(f"{path}: {finding['message']}")
    assert shapes and not others
