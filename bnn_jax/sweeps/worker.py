"""A process of a sweep: trains the runs that it reads from stdin, one after another, and reports on stdout.

python -m bnn_jax.sweeps.worker 0,1   (the cores that it may use)

A line in is a run, ``{"config", "workdir"}``; lines out are ``{"progress": text}`` and, at its end, ``{"finished":
true}``, or one sentence under "usage" or "failed".  SIGTERM saves and ends it with 0.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any


def main() -> None:
    """Take runs from the standard input until it ends, train each, and report on the standard output."""
    if hasattr(os, "sched_setaffinity"):
        # Before JAX starts: it makes as many threads as there are cores.
        os.sched_setaffinity(0, {int(core) for core in sys.argv[1].split(",")})
    # What libraries print must not come between the lines of the report.
    report = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)

    from bnn_jax.compilation import use_compilation_cache
    from bnn_jax.errors import RunError, UsageError
    from bnn_jax.sweeps.engine import Run, train_one
    from bnn_jax.training.config import from_dict

    def tell(message: dict[str, Any]) -> None:
        report.write(json.dumps(message) + "\n")

    use_compilation_cache()
    datasets = {}
    for line in sys.stdin:
        job = json.loads(line)
        try:
            run = Run("", from_dict(job["config"]), Path(job["workdir"]))
            train_one(run, datasets, lambda done, total, text: tell({"progress": text}))
            tell({"finished": True})
        except UsageError as error:
            tell({"usage": str(error)})
        except RunError as error:
            tell({"failed": str(error)})


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        # It was asked to end and has saved; the process that asked tells the user.
        sys.exit(0)
