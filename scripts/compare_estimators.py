"""Compare gradient estimators over several seeds: the command `bnn-jax compare estimators`."""

import sys

from bnn_jax.cli.main import run_command

if __name__ == "__main__":
    sys.exit(run_command("compare estimators"))
