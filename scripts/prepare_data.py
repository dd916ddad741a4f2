"""Download a data set and store it for training: the command `bnn-jax prepare`."""

import sys

from bnn_jax.cli.main import run_command

if __name__ == "__main__":
    sys.exit(run_command("prepare"))
