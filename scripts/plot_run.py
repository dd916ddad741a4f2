"""Draw a run: the command `bnn-jax plot`."""

import sys

from bnn_jax.cli.main import run_command

if __name__ == "__main__":
    sys.exit(run_command("plot"))
