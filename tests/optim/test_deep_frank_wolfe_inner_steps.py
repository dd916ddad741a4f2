"""Several inner Frank-Wolfe steps, against a float64 twin on a linear network, whose linearisation is exact."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.optimize

from bnn_jax.losses import augmented_margins, multiclass_hinge
from bnn_jax.optim.deep_frank_wolfe import deep_frank_wolfe

EXAMPLES, FEATURES, CLASSES = 12, 5, 4
BOX = (-0.4, 0.5)


class Task(NamedTuple):
    inputs: np.ndarray
    labels: np.ndarray
    weights: np.ndarray
    eta: np.float32
    decay: np.float32
    target: np.float32 = np.float32(0)


def random_task(seed: int, decay: float = 0.0, target: float = 0.0) -> Task:
    rng = np.random.default_rng(seed)
    inputs = rng.normal(size=(EXAMPLES, FEATURES)).astype(np.float32)
    weights = rng.uniform(*BOX, size=(FEATURES, CLASSES)).astype(np.float32)
    return Task(
        inputs, rng.integers(0, CLASSES, EXAMPLES), weights, np.float32(2.0), np.float32(decay), np.float32(target)
    )


def margins_of(task: Task, weights: np.ndarray) -> np.ndarray:
    """The augmented scores in float64."""
    logits, rows = task.inputs.astype(np.float64) @ weights, np.arange(EXAMPLES)
    margins = logits - logits[rows, task.labels][:, None] + 1
    margins[rows, task.labels] = 0
    return margins


def primal(task: Task, weights: np.ndarray) -> float:
    start = task.weights.astype(np.float64)
    d, decay = weights - start, float(task.decay)
    loss = max(margins_of(task, weights).max(axis=1).mean() - float(task.target), 0)
    return np.sum(d * d) / (2 * float(task.eta)) + decay * np.sum(start * d) + loss


class Trace(NamedTuple):
    """What the float64 twin saw after each step; `tie` is the least distance of a maximiser from the runner-up."""

    weights: list
    away: list
    duals: list
    primals: list
    tie: float


def twin(task: Task, steps: int, bounds=(-np.inf, np.inf)) -> Trace:
    """Frank-Wolfe on the dual; the line search is a root finder on its derivative."""
    inputs, start = task.inputs.astype(np.float64), task.weights.astype(np.float64)
    eta, decay, rows = float(task.eta), float(task.decay), np.arange(EXAMPLES)
    low, high = (float(np.float32(b)) for b in bounds)

    def move(pull):
        return np.clip(start - eta * pull, low, high) - start

    at_start, g, b, left = margins_of(task, start), np.zeros_like(start), 0.0, 1.0
    trace = Trace([], [], [], [], 0.0)
    tie = np.inf
    for step in range(steps):
        pull = decay * start + g
        seen = at_start if step == 0 else margins_of(task, start + move(pull))
        excess = seen.max(axis=1).mean() - float(task.target)
        tie = min(tie, np.diff(np.sort(seen, axis=1)[:, -2:]).min(), abs(excess))
        chosen = seen.argmax(axis=1)
        one_hot = np.eye(CLASSES)[chosen] - np.eye(CLASSES)[task.labels]
        active = float(excess > 0)  # else the piece 0 of max(L - target, 0)
        change = active * inputs.T @ one_hot / EXAMPLES - g
        gain = active * (at_start[rows, chosen].mean() - float(task.target)) - b

        def slope(gamma, pull=pull, change=change, gain=gain):
            return gain + np.sum(change * move(pull + gamma * change))

        gamma = 0.0 if slope(0) <= 0 else 1.0 if slope(1) >= 0 else scipy.optimize.brentq(slope, 0, 1, xtol=1e-14)
        g, b, left = g + gamma * change, b + gamma * gain, left * (1 - gamma) + gamma * (1 - active)
        pull = decay * start + g
        d = move(pull)
        trace.weights.append(start + d)
        trace.away.append(1 - left)
        trace.duals.append(np.sum(d * d) / (2 * eta) + np.sum(pull * d) + b)
        trace.primals.append(primal(task, start + d))
    return trace._replace(tie=tie)


@functools.partial(jax.jit, static_argnames=("steps", "boxed"))
def step(task: Task, *, steps: int, boxed: bool):
    def network(weights):
        return task.inputs @ weights

    logits, forward = jax.linearize(network, task.weights)
    backward = jax.linear_transpose(forward, task.weights)

    def oracle(displacement):
        active = augmented_margins(logits + forward(displacement), task.labels).argmax(axis=1)
        one_hot = jax.nn.one_hot(active, CLASSES) - jax.nn.one_hot(task.labels, CLASSES)
        offsets = jnp.take_along_axis(augmented_margins(logits, task.labels), active[:, None], axis=1)
        return backward(one_hot / EXAMPLES)[0], offsets.mean()

    def loss(weights):
        return multiclass_hinge(network(weights), task.labels).mean()

    value, gradient = jax.value_and_grad(loss)(task.weights)
    optimizer = deep_frank_wolfe(task.eta, 0.0, task.decay, box=BOX if boxed else None, epsilon=0.0, target=task.target)
    updates, state = optimizer.update(
        gradient, optimizer.init(task.weights), task.weights, value=value, oracle=oracle, inner_steps=steps
    )
    return optax.apply_updates(task.weights, updates), state


SEEDS = (0, 1, 2, 3, 4, 5)


@pytest.mark.parametrize("boxed", [True, False])
@pytest.mark.parametrize("steps", [1, 2, 5, 20])
@pytest.mark.parametrize("target", [0.0, 0.8])
def test_weights_and_step_sizes_are_those_of_the_float64_twin(steps, boxed, target):
    compared = 0
    for seed in SEEDS:
        task = random_task(seed, decay=0.01 * (seed % 2), target=target)
        trace = twin(task, steps, BOX if boxed else (-np.inf, np.inf))
        if trace.tie < 1e-5:  # float32 may rightly choose the other maximiser
            continue
        new, state = step(task, steps=steps, boxed=boxed)
        np.testing.assert_allclose(new, trace.weights[-1], atol=2e-5)
        assert float(state.gamma) == pytest.approx(trace.away[-1], rel=1e-5)
        assert (int(state.search_iterations) >= steps) == boxed
        if boxed:
            assert new.min() >= np.float32(BOX[0])
            assert new.max() <= np.float32(BOX[1])
        compared += 1
    assert compared >= 3


@pytest.mark.parametrize("bounds", [BOX, (-np.inf, np.inf)])
@pytest.mark.parametrize("target", [0.0, 0.8])
def test_the_dual_rises_and_the_gap_closes(bounds, target):
    for seed in SEEDS:
        trace = twin(random_task(seed, decay=0.01, target=target), 20, bounds)
        assert np.diff(trace.duals).min() >= -1e-12
        gaps = np.array(trace.primals) - trace.duals
        assert gaps.min() >= -1e-12
        assert gaps[-5:].min() < 0.25 * gaps[0]


@pytest.mark.parametrize("boxed", [True, False])
def test_more_inner_steps_come_closer_to_the_proximal_optimum(boxed):
    for seed in (0, 1, 2):
        task = random_task(seed)
        bounds = BOX if boxed else (-np.inf, np.inf)
        best = twin(task, 400, bounds).duals[-1]  # a lower bound of the optimum
        gaps = [primal(task, np.asarray(step(task, steps=k, boxed=boxed)[0], np.float64)) - best for k in (1, 20, 200)]
        assert min(gaps) >= -1e-6
        assert gaps[-1] < 0.02 * gaps[0]
        assert gaps[1] < 0.5 * gaps[0]


@pytest.mark.parametrize("boxed", [True, False])
def test_an_oracle_that_fails_changes_nothing(boxed):
    weights = random_task(0).weights
    optimizer = deep_frank_wolfe(1.0, 0.9, box=BOX if boxed else None)

    @jax.jit
    def update(entry, offset):
        def oracle(displacement):
            return jnp.full_like(displacement, entry), offset

        gradient, state = jnp.ones_like(weights), optimizer.init(weights)
        return optimizer.update(gradient, state, weights, value=0.5, oracle=oracle, inner_steps=3)

    for entry, offset in ((np.nan, 0.5), (0.1, np.nan), (np.inf, 0.5), (0.1, np.inf)):
        updates, state = update(entry, offset)
        assert not np.any(updates)
        assert not np.any(state.velocity)
        assert float(state.gamma) == 0
    updates, state = update(0.1, 0.5)
    assert np.any(updates)
    assert 0 < float(state.gamma) <= 1


@pytest.mark.usefixtures("standard_dtypes")
@pytest.mark.parametrize("x64", [False, True])
def test_the_oracle_meets_float32_whatever_the_parameters(x64):
    seen = []

    def oracle(displacement):
        seen.append(jax.tree.map(lambda d: d.dtype, displacement))
        return jax.tree.map(jnp.ones_like, displacement), jnp.asarray(0.5)

    def update(params):
        optimizer = deep_frank_wolfe(0.1, box={"a": (-1.0, 1.0), "b": None})
        state = optimizer.init(params)
        return optimizer.update(params, state, params, value=0.5, oracle=oracle, inner_steps=2)

    with jax.enable_x64(x64):
        updates, _ = jax.jit(update)({"a": jnp.zeros(3, jnp.bfloat16), "b": jnp.zeros((), jnp.float32)})
    assert seen[0] == {"a": jnp.float32, "b": jnp.float32}
    assert updates["a"].dtype == jnp.bfloat16
    assert float(updates["a"][0]) < 0
