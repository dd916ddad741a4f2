"""Size and operations of a network: the command `bnn-jax summarize`."""

import sys

from bnn_jax.cli.main import run_command

if __name__ == "__main__":
    sys.exit(run_command("summarize"))
