"""Prove that a run's packed network is the trained one: the command `bnn-jax verify`."""

import sys

from bnn_jax.cli.main import run_command

if __name__ == "__main__":
    sys.exit(run_command("verify"))
