"""Compare optimizers over several seeds: the command `bnn-jax compare optimizers`."""

import sys

from bnn_jax.cli.main import run_command

if __name__ == "__main__":
    sys.exit(run_command("compare optimizers"))
