"""What is written with PyTorch or Keras is read by pytest where these are installed."""

import sys
from importlib.util import find_spec
from pathlib import Path

sys.path.append(str(Path(__file__).parent))
collect_ignore = [] if find_spec("torch") else ["torch_modules.py", "make_goldens.py"]
collect_ignore += [] if find_spec("keras") else ["make_keras_goldens.py"]
