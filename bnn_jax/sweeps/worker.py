"""A process of a sweep: trains the runs that it reads from stdin, one after another, and reports on stdout.

python -m bnn_jax.sweeps.worker 0,1   (the cores that it may use, or "" for any)

A line in is a run, ``{"config", "workdir"}``; lines out are ``{"progress": [done, total, text]}`` and, at its end,
``{"end": "finished"}``, or ``{"end": "usage" or "failed", "error": one sentence}``.  SIGTERM saves and ends it with 0.
"""

import json
import os
import sys
from typing import Any, TextIO


def main() -> None:
    """Take runs from the standard input until it ends, train each, and report on the standard output."""
    cores = {int(core) for core in sys.argv[1].split(",") if core}
    if cores and hasattr(os, "sched_setaffinity"):
        # Before JAX starts: it makes as many threads as there are cores.
        os.sched_setaffinity(0, cores)
    # What libraries print must not come between the lines of the report.
    report = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    from bnn_jax.errors import RunError, UsageError
    from bnn_jax.sweeps.engine import Run, train_one
    from bnn_jax.training.config import from_dict
    from bnn_jax.training.programs import use_compilation_cache

    use_compilation_cache()
    datasets = {}
    for line in sys.stdin:
        job = json.loads(line)
        run = Run("", from_dict(job["config"]), job["workdir"])
        try:
            train_one(run, datasets, lambda *progress: _tell(report, {"progress": progress}))
            _tell(report, {"end": "finished"})
        except UsageError as error:
            _tell(report, {"end": "usage", "error": str(error)})
        except RunError as error:
            _tell(report, {"end": "failed", "error": str(error)})


def _tell(report: TextIO, message: dict[str, Any]) -> None:
    report.write(json.dumps(message) + "\n")
    report.flush()


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        # It was asked to end and has saved; the process that asked tells the user.
        sys.exit(0)
