"""Times of functions, by a clock that is made up."""

import jax.numpy as jnp

from bnn_jax import timing
from bnn_jax.timing import interleaved_seconds


def test_calls_take_turns_and_the_first_of_each_is_not_timed(monkeypatch):
    now, order = 0.0, []

    def taking(name, seconds):
        def call():
            nonlocal now
            # The first call stands for the one that compiles.
            now += seconds if name in order else 1000.0
            order.append(name)
            return jnp.zeros(())

        return call

    monkeypatch.setattr(timing.time, "perf_counter", lambda: now)
    seconds = interleaved_seconds({"a": taking("a", 0.25), "b": taking("b", 4.0)}, repeats=3)
    assert seconds == {"a": [0.25] * 3, "b": [4.0] * 3}
    assert order == ["a", "b"] * 4
