"""How the steps of an epoch are cut into jitted calls, and how long a run takes."""

from collections.abc import Iterable, Iterator

import numpy as np

from bnn_jax.training.devices import largest
from bnn_jax.training.epoch import Batches

LONGEST_CALL = 3.0
"""Seconds of a jitted call, after which progress shows and a run can be stopped and saved."""


class Pace:
    """How many steps a call makes: as many as end within :data:`LONGEST_CALL`, and at most `most`.

    Attributes:
      milliseconds: what a step of one run took in each call so far; of `members` that train together a part each.
      evaluations: seconds that each evaluation took, of all members.
    """

    def __init__(self, most: int, members: int = 1):
        self.most, self.members = most, members
        self.steps = 1  # nothing is known yet of how long a step takes
        self.milliseconds: list[float] = []
        self.evaluations: list[float] = []

    def took(self, seconds: float, steps: int) -> None:
        """Take account of a call, which compiled nothing."""
        seconds = largest(seconds / steps)  # all processes make calls of the same length
        self.milliseconds.append(1e3 * seconds / self.members)
        self.steps = max(1, min(self.most, int(LONGEST_CALL / seconds)))

    @property
    def median(self) -> float:
        """Milliseconds that a step of one run takes."""
        return float(np.median(self.milliseconds or [0.0]))

    def seconds_left(self, *, steps: int, evaluations: int) -> float:
        """Seconds that so many steps and evaluations of all members take; the first evaluation compiles."""
        each = np.median(self.evaluations[1:] or self.evaluations or [0.0])
        return 1e-3 * steps * self.members * self.median + evaluations * float(each)

    def calls(
        self, parts: Iterable[tuple[Batches, range]], *, done: int, every_steps: int
    ) -> Iterator[tuple[Batches, int, int]]:
        """(batches, number of the first one, count) of one call after another.

        Args:
          parts: of an epoch, see :class:`bnn_jax.training.input_pipeline.InputPipeline`.
          done: steps of the run before them.
          every_steps: a call ends where as many steps, or a multiple, are done; 0 for no such rule.
        """
        for batches, numbers in parts:
            first = numbers.start
            while first < numbers.stop:
                count = min(self.steps, numbers.stop - first)
                count = min(count, every_steps - done % every_steps) if every_steps else count
                yield batches, first, count
                first, done = first + count, done + count
