"""Write made-up images in ImageNet's format: the command `bnn-jax synthesize`."""

import sys

from bnn_jax.cli.main import run_command

if __name__ == "__main__":
    sys.exit(run_command("synthesize"))
