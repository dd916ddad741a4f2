"""The CPU cores that this process may use."""

import os


def usable_cores() -> list[int]:
    """Their numbers: of all cores of the machine those to which the process is not denied, as by `taskset`."""
    return sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else list(range(os.cpu_count() or 1))
