"""The notebooks: stored without outputs, through public names alone; run whole in a kernel, without a warning."""

import ast
import importlib
import json
import re
from pathlib import Path

import nbformat
import numpy as np
import pytest
from nbclient import NotebookClient

FOLDER = Path(__file__).parents[1] / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
STRICT = 'import warnings\nwarnings.filterwarnings("error", module=r"bnn_jax|__main__")'

MODULES = (
    "analysis.diagnostics",
    "analysis.gradient_paths",
    "analysis.path_diagram",
    "analysis.run_plots",
    "training.config",
    "training.metrics",
    "training.progress",
)
"""What a notebook may import from, beside the package and what its packages export."""

OF_01 = """
found = {
    "accuracies": {name: of_seeds.tolist() for name, of_seeds in accuracies.items()},
    "cosines": {name: list(of_steps.values()) for name, of_steps in cosines.items()},
}
"""
OF_02 = """
found = {
    "passed": report.passed,
    "differing": {name: int((own != labels["trained"]).sum()) for name, own in labels.items()},
    "right": float((labels["NumPy"] == test.labels).mean()),
    "smaller": float32 / (here / "own.bnn.safetensors").stat().st_size,
    "operations": len({step["op"] for step in steps}),
    "thresholds": [name for name, own in packed.variables["packed"].items() if "threshold" in own],
}
"""
OF_03 = """
found = {
    "gammas": {eta: run[2].tolist() for eta, run in runs.items()},
    "losses": {eta: run[1].mean(1).tolist() for eta, run in runs.items()},
    "accuracies": {eta: float(test_accuracy(run[0])) for eta, run in runs.items()},
    "largest": {eta: float(np.abs(latent_weights(run[0])).max()) for eta, run in runs.items()},
    "largest_start": float(np.abs(latent_weights(start)).max()),
    "on_bounds": [float((np.abs(latent_weights(run[0])) == bound).mean()) for _, bound, run in cells],
    "longer": [float(run[2].mean() / run[3].mean()) for *_, run in cells],
    "projected": max(map(float, jax.tree.leaves(difference))),
    "acting": {share: float((run[2] < 1).mean()) for share, run in noisy_runs.items()},
    "skipped": float((noisy_runs[0.9][2] == 0).mean()),
    "at_first": {eta: float(gamma_of(eta)) for eta in (3, 10, 30, 100)},
}
"""
OF_04 = """
found = {
    "right": float(np.trace(counts) / counts.sum()),
    "same": bool(same.all()),
    "answers": [run.dataset.class_names[answer] for answer in answers.tolist()],
    "shown": list(2 * CLASSES),
}
"""
OF_05 = """
found = {
    "flips": {name: series(own, None, "flips")[1].tolist() for name, own in records.items()},
    "accuracies": {name: run.history["validation_accuracy"][-1] for name, run in runs.items()},
    "sizes": {name: own.tolist() for name, own in sizes.items()},
    "never": {name: float(series(own, None, "never_flipped")[1][-1]) for name, own in records.items()},
    "cosines": list(map(float, means)),
    "lengths": [module_gradient_paths(block, (1, 8, 8, 16)).lengths for block in (AroundTwo(), AroundEach())],
    "costs": [module_gradient_paths(block, (1, 8, 8, 16)).costs for block in (AroundTwo(), AroundEach())],
}
"""


@pytest.fixture
def execute(tmp_path, subprocess_env):
    """Runs a notebook in an empty folder and returns the `found` of a last cell, which JSON takes.

    Fails on any error, on a warning from the package or the cells, on what goes to stderr, and if the run leaves a file
    in its folder.
    """

    def run(name, last_cell):
        notebook = nbformat.read(FOLDER / f"{name}.ipynb", as_version=4)
        notebook.cells.insert(0, nbformat.v4.new_code_cell(STRICT))
        last = f"import json\n{last_cell}\nprint(json.dumps(found))"
        notebook.cells.append(nbformat.v4.new_code_cell(last))
        working, temporary, ipython, caches = (tmp_path / part for part in ("work", "tmp", "ipython", "cache"))
        for folder in (working, temporary, ipython, caches):
            folder.mkdir()
        env = subprocess_env | {"TMPDIR": str(temporary), "IPYTHONDIR": str(ipython), "XDG_CACHE_HOME": str(caches)}
        env |= {"JAX_NUMPY_RANK_PROMOTION": "raise", "XLA_FLAGS": ""}  # it computes longer than it compiles
        resources = {"metadata": {"path": str(working)}}
        NotebookClient(notebook, timeout=600, kernel_name="python3", resources=resources).execute(env=env)
        assert list(working.rglob("*")) == []
        outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
        assert not [output for output in outputs if output.get("name") == "stderr"]
        return json.loads(notebook.cells[-1].outputs[-1].text)

    return run


@pytest.mark.full
def test_01_prototype_an_estimator(execute):
    found = execute("01_prototype_an_estimator", OF_01)
    assert set(found["accuracies"]) == {"ste_sign", "approx_sign", "biweight_sign"}
    for accuracies in map(np.array, found["accuracies"].values()):
        assert accuracies.shape == (3, 10)
        assert accuracies[:, -1].min() > 85
    cosines = {name: np.array(of_steps) for name, of_steps in found["cosines"].items()}
    assert all((np.abs(values) <= 1).all() for values in cosines.values())
    clipped = [cosines[name].mean() for name in found["accuracies"]]
    assert np.mean(clipped) > cosines["identity_sign"].mean()


@pytest.mark.full
def test_02_your_own_network(execute):
    found = execute("02_your_own_network", OF_02)
    assert found["passed"] and found["differing"] == {"trained": 0, "file": 0, "NumPy": 0}
    assert found["right"] > 0.95
    assert found["smaller"] > 10
    assert found["operations"] == 9
    assert found["thresholds"] == ["BatchNorm_1", "BatchNorm_2"]


@pytest.mark.full
def test_03_deep_frank_wolfe(execute):
    found = execute("03_deep_frank_wolfe", OF_03)
    gammas = {float(eta): np.array(values) for eta, values in found["gammas"].items()}
    assert (gammas[0.03] == 1).all()
    assert (gammas[0.3][0] == 1).mean() > 0.9 and 0.5 < gammas[0.3][-5:].mean() < 0.99
    assert gammas[3.0].mean(1).max() < 0.5
    assert min(found["accuracies"].values()) > 60
    losses = {float(eta): values for eta, values in found["losses"].items()}
    assert losses[3.0][0] > losses[0.3][0] and losses[3.0][-1] > losses[0.3][-1]
    largest = {float(eta): value for eta, value in found["largest"].items()}
    assert largest[0.03] < largest[0.3] < 1 == largest[3.0]
    assert found["largest_start"] < 0.25
    small, middle, large, narrow = found["on_bounds"]
    assert small == middle == 0 < large < narrow
    np.testing.assert_allclose(found["longer"][:2], 1, atol=2e-3)
    assert found["longer"][3] > found["longer"][2] > 0.999
    assert found["projected"] < 1e-6
    assert found["acting"]["0.0"] == 0 and found["acting"]["0.9"] > 0.5
    assert found["skipped"] > 0.1
    assert found["at_first"]["3"] == found["at_first"]["10"] == 1 > found["at_first"]["30"] > found["at_first"]["100"]


@pytest.mark.full
def test_04_your_own_images(execute):
    found = execute("04_your_own_images", OF_04)
    assert found["right"] > 0.85 and found["same"]
    assert sum(a == b for a, b in zip(found["answers"], found["shown"])) >= 4


@pytest.mark.full
def test_05_reading_runs(execute):
    found = execute("05_reading_runs", OF_05)
    large, small = (np.array(found["flips"][name]) for name in ("rate 0.1", "rate 0.01"))
    assert large[0] > 2 * small[0]
    assert 0.4 < np.median(large[2:-1] / small[2:-1]) < 2.5
    assert large[-1] < large[0] / 20 and small[-1] < small[0] / 20
    assert min(np.array(found["sizes"]["rate 0.1"]) / found["sizes"]["rate 0.01"]) > 1.5
    assert found["accuracies"]["rate 0.1"] > found["accuracies"]["rate 0.01"] + 0.02
    assert found["never"]["rate 0.1"] < 0.3 < 0.4 < found["never"]["rate 0.01"] < 0.5
    assert abs(found["cosines"][0]) < 0.3 and found["cosines"][-1] > 0.7
    assert found["lengths"] == [[0, 2], [0, 1, 2]]
    (_, both), (_, one, two) = found["costs"]
    assert both == two == 2 * one


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_stored_without_outputs(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell for cell in code if cell.outputs or cell.execution_count] == []
    assert path.stat().st_size < 40_000
    first = notebook.cells[0]
    assert first.cell_type == "markdown" and first.source.startswith("# ")


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_cell_that_draws_says_what_is_to_be_seen(path):
    for cell in nbformat.read(path, as_version=4).cells:
        draws = cell.cell_type == "code" and re.search(r"^(figure|axes|draw)\b.*\(", cell.source, re.M)
        text = cell.metadata.get("mystnb", {}).get("image", {}).get("alt", "")
        assert bool(draws) == bool(text), cell.source
        assert not draws or (text.endswith(".") and len(text) > 40)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_imports_public_names_alone(path):
    code = [cell.source for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]
    tree = ast.parse("\n".join(code))
    imports = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom | ast.Import)]
    of_package = [node for node in imports if isinstance(node, ast.ImportFrom) and node.module.startswith("bnn_jax")]
    assert of_package
    assert not [node for node in imports if isinstance(node, ast.Import) and "bnn_jax." in ast.unparse(node)]
    for node in of_package:
        module = importlib.import_module(node.module)
        defined = [name for name, value in vars(module).items() if getattr(value, "__module__", None) == node.module]
        exported = getattr(module, "__all__", None)
        if exported is None:
            assert node.module.removeprefix("bnn_jax.") in MODULES, f"{node.module} is no module for users"
        names = {alias.name for alias in node.names}
        public = {name for name in (exported or defined) if not name.startswith("_")}
        assert names <= public, f"{node.module} does not export {sorted(names - public)}"
    private = [n.attr for n in ast.walk(tree) if isinstance(n, ast.Attribute) and re.match(r"_[^_]", n.attr)]
    assert private == []


def test_every_notebook_is_run_by_a_test():
    assert {f"test_{path.stem}" for path in NOTEBOOKS} <= set(globals())
