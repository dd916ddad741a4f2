"""Pack a run into one file: the command `bnn-jax export`."""

import sys

from bnn_jax.cli.main import run_command

if __name__ == "__main__":
    sys.exit(run_command("export"))
