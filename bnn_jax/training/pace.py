"""How the steps of an epoch are cut into jitted calls, and how long a run takes."""

import time
from collections.abc import Callable, Iterable, Iterator
from datetime import timedelta
from typing import Any

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

    def timed(self, evaluate: Callable[..., Any]) -> Callable[..., Any]:
        """The evaluation of all members, each call kept count of."""

        def timed_evaluate(*arguments: Any) -> Any:
            began = time.perf_counter()
            found = evaluate(*arguments)
            self.evaluations.append(time.perf_counter() - began)
            return found

        return timed_evaluate

    def told(self, batch_size: int, *, steps: int, evaluations: int) -> list[str]:
        """How many images are trained on in a second, and how long so many steps and evaluations of a run will take.

        >>> pace = Pace(most=10)
        >>> pace.took(0.5, steps=5)
        >>> pace.told(32, steps=420, evaluations=0), pace.told(32, steps=0, evaluations=0)
        (['320 images/s', '0:00:42 left'], ['320 images/s'])
        >>> pace.evaluations = [30.0, 1.0, 2.0, 3.0]
        >>> pace.told(32, steps=420, evaluations=9)
        ['320 images/s', '0:01:00 left']
        """
        if not self.median:
            return []
        each = np.median(self.evaluations[1:] or [0.0])  # the first one compiles
        left = timedelta(seconds=round(1e-3 * steps * self.members * self.median + evaluations * float(each)))
        return [f"{1e3 * batch_size / self.median:,.0f} images/s", *([f"{left} left"] if steps or evaluations else [])]

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
