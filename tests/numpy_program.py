"""The program of docs/, which runs an exported network with NumPy alone."""

import runpy
from pathlib import Path

PATH = Path(__file__).parents[1] / "docs" / "numpy_inference.py"
_names = runpy.run_path(str(PATH))
logits, OPERATIONS = _names["logits"], _names["OPERATIONS"]
