"""Train a grid of settings over several seeds: the command `bnn-jax sweep`."""

import sys

from bnn_jax.cli.main import run_command

if __name__ == "__main__":
    sys.exit(run_command("sweep"))
