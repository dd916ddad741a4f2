"""Schedules follow their curve, also from a traced value, and take options by name."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bnn_jax.schedules import SCHEDULES, exponential, make_schedule, staircase

CURVES = {
    "constant": lambda share: 1.0,
    "cosine": lambda share: (1 + np.cos(np.pi * share)) / 2,
    "linear": lambda share: 1 - share,
    "exponential": lambda share: 1e-3**share,
    "staircase": lambda share: 0.1 ** min(int(np.floor(5 * share + 1e-9)), 4),
}


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("total_steps", [1, 7, 50, 195_000])
def test_schedules_follow_their_curve_from_the_value_at_the_first_step(name, total_steps):
    schedule = SCHEDULES[name](3e-3, total_steps)
    jitted = jax.jit(schedule)
    assert float(schedule(0)) == pytest.approx(3e-3)
    for step in sorted({0, 1, total_steps // 5, total_steps // 2, total_steps - 1, total_steps}):
        expected = 3e-3 * CURVES[name](step / total_steps)
        assert float(schedule(step)) == pytest.approx(expected, rel=1e-4, abs=1e-9)
        assert float(jitted(jnp.int32(step))) == pytest.approx(expected, rel=1e-4, abs=1e-9)
    assert jitted._cache_size() == 1


@pytest.mark.parametrize("name", SCHEDULES)
def test_the_value_of_a_schedule_may_be_traced(name):
    at_half = jax.jit(lambda value: jnp.asarray(SCHEDULES[name](value, 10)(5), jnp.float32))
    for value in (1.0, 2e-3):
        assert float(at_half(value)) == pytest.approx(value * CURVES[name](0.5), rel=1e-5)
    assert at_half._cache_size() == 1


def test_a_staircase_steps_down_at_equal_distances_and_stays():
    schedule = staircase(1.0, 30, stages=3, factor=0.5)
    levels = [float(schedule(step)) for step in range(100)]
    assert levels == [1.0] * 10 + [0.5] * 10 + [0.25] * 80


def test_an_exponential_ends_at_its_share():
    assert float(exponential(3e-3, 500, final_share=2e-6 / 3e-3)(500)) == pytest.approx(2e-6, rel=1e-5)
    ratios = [float(exponential(1.0, 20)(step + 1)) / float(exponential(1.0, 20)(step)) for step in range(20)]
    np.testing.assert_allclose(ratios, ratios[0], rtol=1e-5)


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: exponential(1.0, 10, final_share=0.0), r"^`final_share` \(=0.0\) must be positive; 1e-3 is usual$"),
        (lambda: staircase(1.0, 10, stages=0), r"^`stages` \(=0\) must be at least 1; 5 is usual$"),
        (lambda: staircase(1.0, 10, factor=-1.0), r"^`factor` \(=-1.0\) must be positive; 0.1 is usual$"),
    ],
)
def test_schedules_refuse_values_out_of_range(make, text):
    with pytest.raises(ValueError, match=text):
        make()


def test_a_schedule_is_made_from_a_name_or_a_function():
    by_name = make_schedule("staircase", 1.0, 30, stages=3, factor=0.5)
    by_function = make_schedule(staircase, 1.0, 30, stages=3, factor=0.5)
    own = make_schedule(lambda value, total_steps, *, power=1.0: lambda step: value * step**power, 2.0, 30, power=2.0)
    for step in (0, 9, 10, 29):
        assert float(by_name(step)) == float(by_function(step)) == float(staircase(1.0, 30, stages=3, factor=0.5)(step))
        assert own(step) == 2.0 * step**2


@pytest.mark.parametrize(
    ("name", "options", "text"),
    [
        ("cos", {}, r"^`schedule` \(='cos'\) is not known; did you mean 'cosine'\?"),
        ("cosine", {"stages": 3}, r"^`options` \(='stages'\) is not known; there is no option to set, leave it out$"),
        ("staircase", {"stage": 3}, r"^`options` \(='stage'\) is not known; did you mean 'stages'\?"),
        ("staircase", {"stages": "3"}, r"^`stages` \(='3'\) must be a whole number$"),
    ],
)
def test_what_no_schedule_can_be_made_of_is_refused(name, options, text):
    with pytest.raises(ValueError, match=text):
        make_schedule(name, 1.0, 10, **options)
