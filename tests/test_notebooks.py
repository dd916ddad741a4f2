"""The notebooks: run whole in a kernel without a warning, leaving nothing behind; stored with their outputs."""

import json
from pathlib import Path

import nbformat
import numpy as np
import pytest
from nbclient import NotebookClient

FOLDER = Path(__file__).parents[1] / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
STRICT = 'import warnings\nwarnings.filterwarnings("error", module=r"bnn_jax|__main__")'

PROTOTYPE_RESULTS = """
import json

found = {
    "accuracies": {name: of_seeds.tolist() for name, of_seeds in accuracies.items()},
    "flips": {name: rates.tolist() for name, rates in flips.items()},
    "cosines": {name: list(of_steps.values()) for name, of_steps in cosines.items()},
}
print(json.dumps(found))
"""


def execute(name, last_cell, *, folder, env, shortened):
    """Run a notebook in an empty folder and return what `last_cell`, in its namespace, prints as JSON.

    `shortened` are texts of one cell and what takes their place.  Fails on any error, on a warning from the package or
    the cells, and if the run leaves a file behind.
    """
    notebook = nbformat.read(FOLDER / f"{name}.ipynb", as_version=4)
    for text, other in shortened.items():
        (cell,) = [cell for cell in notebook.cells if text in cell.source]
        cell.source = cell.source.replace(text, other)
    notebook.cells.insert(0, nbformat.v4.new_code_cell(STRICT))
    notebook.cells.append(nbformat.v4.new_code_cell(last_cell))
    working, temporary, ipython = (folder / part for part in ("working", "temporary", "ipython"))
    for part in (working, temporary, ipython):
        part.mkdir()
    env = env | {"TMPDIR": str(temporary), "IPYTHONDIR": str(ipython), "JAX_NUMPY_RANK_PROMOTION": "raise"}
    env["XLA_FLAGS"] = ""  # it computes longer than it compiles
    resources = {"metadata": {"path": str(working)}}
    NotebookClient(notebook, timeout=300, kernel_name="python3", resources=resources).execute(env=env)
    assert [*working.rglob("*"), *temporary.rglob("*")] == []
    return json.loads(notebook.cells[-1].outputs[-1].text)


@pytest.mark.full
@pytest.mark.parametrize(("seeds", "epochs"), [(3, 12)])
def test_01_prototype_an_estimator(seeds, epochs, tmp_path, subprocess_env):
    found = execute(
        "01_prototype_an_estimator",
        PROTOTYPE_RESULTS,
        folder=tmp_path,
        env=subprocess_env,
        shortened={"SEEDS = (0, 1, 2)": f"SEEDS = {tuple(range(seeds))}", "epochs=12": f"epochs={epochs}"},
    )
    assert set(found["accuracies"]) == {"ste_sign", "approx_sign", "biweight_sign"}
    for accuracies in map(np.array, found["accuracies"].values()):
        assert accuracies.shape == (seeds, epochs)
        assert accuracies[:, -1].min() > 85
    for rates in map(np.array, found["flips"].values()):
        assert rates.shape == (seeds, epochs)
        assert (rates[:, 0] > 0.1).all()
        assert (rates[:, -1] < 0.02).all()
    cosines = {name: np.array(of_steps) for name, of_steps in found["cosines"].items()}
    assert all((np.abs(values) <= 1).all() for values in cosines.values())
    clipped = [cosines[name].mean() for name in found["accuracies"]]
    assert np.mean(clipped) > cosines["identity_sign"].mean()


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_stored_executed_from_top_to_bottom(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    outputs = [output for cell in code for output in cell.outputs]
    assert outputs
    assert not [output for output in outputs if output.output_type == "error" or output.get("name") == "stderr"]
    assert path.stat().st_size < 600_000


def test_every_notebook_is_run_by_a_test():
    assert {f"test_{path.stem}" for path in NOTEBOOKS} <= set(globals())
