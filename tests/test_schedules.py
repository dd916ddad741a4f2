"""Schedules follow their curve, also from a traced value, and take options by name."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bnn_jax.schedules import SCHEDULES, exponential, make_schedule, milestones

CURVES = {
    "constant": lambda share: 1.0,
    "cosine": lambda share: (1 + np.cos(np.pi * share)) / 2,
    "linear": lambda share: 1 - share,
    "exponential": lambda share: 1e-3**share,
    "milestones": lambda share: 0.1 ** (int(share >= 0.5) + int(share >= 0.75)),
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


def test_milestones_have_one_factor_or_one_each_and_the_last_level_stays():
    schedule = milestones(1.0, 30, at_shares=(1 / 3, 2 / 3), factor=0.5)
    assert [float(schedule(step)) for step in range(100)] == [1.0] * 10 + [0.5] * 10 + [0.25] * 80
    each = milestones(1.0, 8, at_shares=(0.25, 0.5, 0.75), factor=(0.5, 4.0, 0.125))
    assert [float(each(step)) for step in range(8)] == [1, 1, 0.5, 0.5, 2, 2, 0.25, 0.25]


@pytest.mark.parametrize("steps_per_epoch", [1, 3, 390, 5004, 10009])
def test_a_milestone_given_as_epochs_over_epochs_is_the_first_step_of_its_epoch(steps_per_epoch):
    for epochs in (75, 90, 120, 400):
        for epoch in (1, 7, 40, 60, 70):
            schedule = milestones(1.0, epochs * steps_per_epoch, at_shares=epoch / epochs)
            first = epoch * steps_per_epoch
            assert (float(schedule(first - 1)), float(schedule(first))) == (1.0, pytest.approx(0.1))


def test_milestones_that_a_short_run_cannot_tell_apart_are_all_passed():
    schedule = milestones(1.0, 3, at_shares=(0.7, 0.8, 0.9), factor=0.5)
    assert [float(schedule(step)) for step in range(4)] == [1, 1, 1, 0.125]


@pytest.mark.parametrize("name", ["cosine", "linear", "exponential"])
def test_a_final_share_is_the_floor_of_a_curve(name):
    schedule = SCHEDULES[name](2.0, 50, final_share=0.05)
    values = np.array([float(schedule(step)) for step in range(51)])
    assert values[-1] == pytest.approx(0.1, rel=1e-5)
    assert (np.diff(values) <= 0).all()
    if name != "exponential":
        np.testing.assert_allclose(values, 0.1 + 1.9 * np.array([CURVES[name](s / 50) for s in range(51)]), rtol=1e-5)


@pytest.mark.parametrize("name", SCHEDULES)
def test_after_a_warm_up_curves_take_what_is_left_and_milestones_stay(name):
    """100 steps, 20 of them warm-up from a quarter of the rate."""
    schedule = make_schedule(name, 2.0, 100, warmup_share=0.2, warmup_start_share=0.25)
    found = np.array([float(schedule(step)) for step in range(101)])
    np.testing.assert_allclose(found[:21], 0.5 + 1.5 * np.arange(21) / 20, rtol=1e-6)
    share = np.arange(20, 101) / 100 if name == "milestones" else np.arange(81) / 80
    np.testing.assert_allclose(found[20:], [2 * CURVES[name](s) for s in share], rtol=1e-4, atol=1e-6)
    traced = jax.jit(lambda value, step: make_schedule(name, value, 100, warmup_share=0.2)(step))
    assert float(traced(2.0, 10)) == pytest.approx(1.0)


def test_a_function_of_ones_own_follows_the_warm_up_with_the_steps_that_are_left():
    own = make_schedule(lambda value, total_steps: lambda step: value + step / total_steps, 3.0, 50, warmup_share=0.1)
    assert [float(own(step)) for step in (0, 5, 50)] == [0.0, 3.0, 4.0]


def test_a_cosine_with_cycles_restarts_as_bnas_does():
    """250 epochs, a cosine of 50 five times, 7 steps an epoch."""
    schedule = jax.vmap(SCHEDULES["cosine"](0.05, 1750, cycles=5))
    expected = 0.025 * (1 + np.cos(np.pi * (np.arange(1750) % 350) / 350))
    np.testing.assert_allclose(schedule(jnp.arange(1750)), expected, rtol=1e-4, atol=1e-8)
    with pytest.raises(ValueError, match=r"^`cycles` \(=0\) must be at least 1; 1 has no restarts$"):
        SCHEDULES["cosine"](1.0, 10, cycles=0)


def test_an_exponential_ends_at_its_share():
    assert float(exponential(3e-3, 500, final_share=2e-6 / 3e-3)(500)) == pytest.approx(2e-6, rel=1e-5)
    ratios = [float(exponential(1.0, 20)(step + 1)) / float(exponential(1.0, 20)(step)) for step in range(20)]
    np.testing.assert_allclose(ratios, ratios[0], rtol=1e-5)


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: exponential(1.0, 10, final_share=0.0), r"^`final_share` \(=0.0\) must be positive; 1e-3 is usual$"),
        (
            lambda: SCHEDULES["cosine"](1.0, 10, final_share=2.0),
            r"^`final_share` \(=2.0\) must be in \[0, 1\]; it is a",
        ),
        (lambda: milestones(1.0, 10, at_shares=(0.5, 0.4)), r"^`at_shares` \(=\(0.5, 0.4\)\) must rise from above 0"),
        (
            lambda: milestones(1.0, 10, at_shares=40.0),
            r"^`at_shares` \(=40.0\) must rise .*; they are shares of the run$",
        ),
        (lambda: milestones(1.0, 10, factor=-1.0), r"^`factor` \(=-1.0\) must be positive; 0.1 is usual$"),
        (
            lambda: milestones(1.0, 10, factor=(0.1, 0.2, 0.3)),
            r"must be one number, or one for each of the 2 milestones$",
        ),
        (lambda: make_schedule("linear", 1.0, 10, warmup_share=1.0), r"^`warmup_share` \(=1.0\) must be in \[0, 1\)"),
        (lambda: make_schedule("linear", 1.0, 10, warmup_start_share=-1.0), r"^`warmup_start_share` \(=-1.0\) must be"),
    ],
)
def test_schedules_refuse_values_out_of_range(make, text):
    with pytest.raises(ValueError, match=text):
        make()


def test_a_schedule_is_made_from_a_name_or_a_function():
    options = {"at_shares": 0.3, "factor": 0.5}
    by_name = make_schedule("milestones", 1.0, 30, **options)
    by_function = make_schedule(milestones, 1.0, 30, **options)
    own = make_schedule(lambda value, total_steps, *, power=1.0: lambda step: value * step**power, 2.0, 30, power=2.0)
    for step in (0, 9, 10, 29):
        assert float(by_name(step)) == float(by_function(step)) == float(milestones(1.0, 30, **options)(step))
        assert own(step) == 2.0 * step**2


@pytest.mark.parametrize(
    ("name", "options", "text"),
    [
        ("cos", {}, r"^`schedule` \(='cos'\) is not known; did you mean 'cosine'\?"),
        ("constant", {"factor": 3}, r"^`options` \(='factor'\) is not known; there is no option to set, leave it out$"),
        ("milestones", {"at_share": 0.5}, r"^`options` \(='at_share'\) is not known; did you mean 'at_shares'\?"),
        ("milestones", {"factor": "0.1"}, r"^`factor` \(='0.1'\) must be a number or several$"),
    ],
)
def test_what_no_schedule_can_be_made_of_is_refused(name, options, text):
    with pytest.raises(ValueError, match=text):
        make_schedule(name, 1.0, 10, **options)
