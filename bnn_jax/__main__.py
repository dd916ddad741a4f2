"""`python -m bnn_jax` is the command `bnn-jax`."""

import sys

from bnn_jax.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
