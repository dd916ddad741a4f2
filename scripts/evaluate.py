"""Evaluate a run or a file: the command `bnn-jax evaluate`."""

import sys

from bnn_jax.cli.main import run_command

if __name__ == "__main__":
    sys.exit(run_command("evaluate"))
