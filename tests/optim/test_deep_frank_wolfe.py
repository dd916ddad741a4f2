"""Deep Frank-Wolfe against a float64 solver of the same dual, its optimality conditions, and its known limits."""

from typing import NamedTuple

import chex
import jax
import numpy as np
import optax
import pytest
import scipy.optimize
from hypothesis import given, settings
from hypothesis import strategies as st

from bnn_jax.optim.deep_frank_wolfe import deep_frank_wolfe

SHAPES = {"conv": (3, 3, 2, 4), "dense": (5, 7), "bias": (7,), "scale": (), "one": (1,)}
BOXED = ("conv", "dense", "one")
FLOAT32_EPS = float(np.finfo(np.float32).eps)


class Problem(NamedTuple):
    """One update: leaves in float32, `bounds` for the leaves that have a box, scalars in float32."""

    params: dict
    gradient: dict
    bounds: dict
    loss: np.float32
    eta: np.float32
    decay: np.float32 = np.float32(0)
    epsilon: np.float32 = np.float32(0)
    momentum: np.float32 = np.float32(0)
    target: np.float32 = np.float32(0)
    latent_decay: np.float32 = np.float32(0)  # beside `decay`, for the leaves with a box


# ---- the oracle: float64, one vector, breakpoints sorted


class Flat(NamedTuple):
    """A problem as one float64 vector: w, delta and the bounds; free weights have infinite ones."""

    w: np.ndarray
    delta: np.ndarray
    lower: np.ndarray
    upper: np.ndarray
    loss: float  # above the target
    eta: float
    decay: float | np.ndarray
    epsilon: float


def flatten(problem: Problem) -> Flat:
    def vector(leaf_of):
        leaves = [np.broadcast_to(np.asarray(leaf_of(name), np.float64), SHAPES[name]).ravel() for name in SHAPES]
        return np.concatenate(leaves)

    return Flat(
        vector(problem.params.get),
        vector(problem.gradient.get),
        vector(lambda name: problem.bounds.get(name, (-np.inf, np.inf))[0]),
        vector(lambda name: problem.bounds.get(name, (-np.inf, np.inf))[1]),
        float(problem.loss) - float(problem.target),
        float(problem.eta),
        vector(lambda name: float(problem.decay) + float(problem.latent_decay) * (name in BOXED)),
        float(problem.epsilon),
    )


def displacement(flat: Flat, gamma: float) -> np.ndarray:
    step = -flat.eta * (flat.decay * flat.w + gamma * flat.delta)
    return np.clip(step, flat.lower - flat.w, flat.upper - flat.w)


def dual_slope(flat: Flat, gamma: float) -> float:
    return flat.loss + flat.delta @ displacement(flat, gamma) - flat.epsilon * gamma


def dual(flat: Flat, gamma: float) -> float:
    d = displacement(flat, gamma)
    pull = flat.decay * flat.w + gamma * flat.delta
    return d @ d / (2 * flat.eta) + pull @ d + gamma * flat.loss - flat.epsilon * gamma**2 / 2


def best_gamma(flat: Flat) -> float:
    """argmax over [0, 1] of the dual: sort where weights meet a bound, find the piece, solve it."""
    if not flat.delta.any() or dual_slope(flat, 0) <= 0:
        return 0.0
    if dual_slope(flat, 1) >= 0:
        return 1.0
    moving = flat.delta != 0
    start = (1 - flat.eta * flat.decay) * flat.w
    meets = [(start - bound)[moving] / (flat.eta * flat.delta[moving]) for bound in (flat.lower, flat.upper)]
    knots = np.concatenate([[0.0, 1.0], *meets])
    knots = np.unique(knots[(knots >= 0) & (knots <= 1)])
    left, right = 0, len(knots) - 1
    while right - left > 1:
        middle = (left + right) // 2
        left, right = (middle, right) if dual_slope(flat, knots[middle]) > 0 else (left, middle)
    high, low = dual_slope(flat, knots[left]), dual_slope(flat, knots[right])
    return knots[left] + (knots[right] - knots[left]) * high / (high - low)


def free_weights(flat: Flat, gamma: float) -> np.ndarray:
    step = -flat.eta * (flat.decay * flat.w + gamma * flat.delta)
    return (step > flat.lower - flat.w) & (step < flat.upper - flat.w)


def scale_of_slope(flat: Flat, gamma: float) -> float:
    """Sum of the absolute terms that D' adds up: what its rounding errors are relative to."""
    terms = flat.eta * (flat.decay * np.abs(flat.w) + gamma * np.abs(flat.delta))
    terms = np.where(free_weights(flat, gamma), terms, np.abs(displacement(flat, gamma)))
    return abs(flat.loss) + np.abs(flat.delta) @ terms + flat.epsilon * gamma


def condition(flat: Flat, gamma: float) -> float:
    """How much a relative error of the terms of D' moves its root: sum of |terms| / (|D''| gamma)."""
    curvature = flat.epsilon + flat.eta * np.sum(flat.delta[free_weights(flat, gamma)] ** 2)
    with np.errstate(divide="ignore"):
        return scale_of_slope(flat, gamma) / np.float64(curvature * gamma)


def gamma_tolerance(flat: Flat, gamma: float) -> float:
    """The search stops at a relative 1e-6; float32 sums of a few hundred terms err by some 8 eps of their scale."""
    return 0.0 if gamma in (0.0, 1.0) else gamma * (1e-6 + 8 * FLOAT32_EPS * condition(flat, gamma))


# ---- the code under test, compiled once for all problems


@jax.jit
def update(problem: Problem, velocity):
    box = {name: problem.bounds.get(name) for name in SHAPES}
    decays = {name: problem.decay + problem.latent_decay if name in BOXED else problem.decay for name in SHAPES}
    settings = {"box": box, "epsilon": problem.epsilon, "target": problem.target}
    optimizer = deep_frank_wolfe(problem.eta, problem.momentum, lambda _: decays, **settings)
    state = optimizer.init(problem.params)._replace(velocity=velocity)
    updates, state = optimizer.update(problem.gradient, state, problem.params, value=problem.loss)
    return optax.apply_updates(problem.params, updates), state


def zeros() -> dict:
    return {name: np.zeros(shape, np.float32) for name, shape in SHAPES.items()}


def as_vector(tree: dict) -> np.ndarray:
    return np.concatenate([np.asarray(tree[name], np.float64).ravel() for name in SHAPES])


def random_problem(
    rng,
    *,
    loss=None,
    eta=None,
    gradient=1.0,
    decay=0.0,
    epsilon=1e-5,
    place="inside",
    momentum=0.0,
    box=True,
    target=0.0,
    latent_decay=0.0,
) -> Problem:
    """By default an everyday problem: gamma inside (0, 1) and some weights pushed against the box.

    The target is a share of the loss.
    """
    loss = 10.0 ** rng.uniform(-3, 1) if loss is None else loss
    params, gradients, bounds = {}, {}, {}
    for name, shape in SHAPES.items():
        w = np.asarray(rng.normal(size=shape) * 0.7, np.float32)
        g = np.asarray(rng.normal(size=shape) * gradient * 10.0 ** rng.uniform(-1, 0), np.float32)
        if box and name in BOXED:
            lower, upper = np.float32(-rng.uniform(0.2, 1.5)), np.float32(rng.uniform(0.1, 1.5))
            bounds[name] = (lower, upper)
            if place != "outside":
                w = np.clip(w, lower, upper)
            if place == "on the bounds":
                w = np.where(rng.random(shape) < 0.5, lower, upper).astype(np.float32)
        params[name], gradients[name] = w, np.where(rng.random(shape) < 0.1, np.float32(0), g)
    if rng.random() < 0.2:
        gradients[rng.choice(list(SHAPES))] *= np.float32(0)
    if eta is None:
        eta = loss / np.sum(as_vector(gradients) ** 2) * 10.0 ** rng.uniform(-0.3, 2.5)
    scalars = (loss, np.clip(eta, 1e-8, 1e6), decay, epsilon, momentum, target * loss, latent_decay)
    return Problem(params, gradients, bounds, *(np.float32(x) for x in scalars))


def check_against_oracle(problem: Problem) -> tuple[float, float]:
    """Compare gamma and the new weights with the oracle's; return its gamma and the condition number."""
    flat = flatten(problem)
    expected = best_gamma(flat)
    new, state = update(problem, zeros())
    gamma = float(state.gamma)
    tolerance = gamma_tolerance(flat, expected)
    # A gamma below the smallest normal float32 is flushed to zero.
    assert abs(gamma - expected) <= tolerance + 1.2e-38
    w = flat.w + displacement(flat, expected)
    terms = np.abs(flat.w) + flat.eta * (flat.decay * np.abs(flat.w) + expected * np.abs(flat.delta))
    np.testing.assert_array_less(
        np.abs(as_vector(new) - w), 4 * FLOAT32_EPS * terms + flat.eta * np.abs(flat.delta) * tolerance + 1e-37
    )
    return expected, 1.0 if expected in (0.0, 1.0) else condition(flat, expected)


REGIMES = {
    "everyday": {},
    "no epsilon": {"epsilon": 0.0},
    "large epsilon": {"epsilon": 10.0},
    "weight decay": {"decay": 1e-3},
    "on the bounds": {"place": "on the bounds"},
    "outside the box": {"place": "outside"},
    "outside, decay": {"place": "outside", "decay": 0.01},
    "zero loss": {"loss": 0.0, "eta": 0.3},
    "zero loss outside": {"loss": 0.0, "eta": 0.3, "place": "outside"},
    "negative loss": {"loss": -0.5, "eta": 0.3},
    "zero gradient": {"gradient": 0.0, "eta": 0.3, "decay": 0.1},
    "huge eta": {"eta": 1e6},
    "tiny eta": {"eta": 1e-8},
    "huge gradient": {"gradient": 1e15, "eta": 1.0},
    "huge gradient and eta": {"gradient": 1e15, "eta": 1e6},
    "tiny gradient": {"gradient": 1e-20, "eta": 1.0},
    "tiny gradient, no epsilon": {"gradient": 1e-20, "eta": 1e6, "epsilon": 0.0},
    "target": {"target": 0.7},
    "target, latent decay": {"target": 0.7, "latent_decay": 0.03},
    "target, both decays": {"target": 0.3, "decay": 1e-3, "latent_decay": 0.01},
    "target, outside": {"target": 0.9, "latent_decay": 0.03, "place": "outside"},
    "target above the loss": {"target": 1.2, "latent_decay": 0.03, "eta": 0.3},
    "no box": {"box": False},
    "no box, target": {"box": False, "target": 0.7, "decay": 1e-3},
    "no box, negative loss": {"box": False, "loss": -0.5, "eta": 0.3},
    "no box, tiny gradient": {"box": False, "gradient": 1e-20, "eta": 1e-3, "loss": 0.5, "epsilon": 0.0},
    "no box, decay, no epsilon": {"box": False, "decay": 1e-3, "epsilon": 0.0},
}


@pytest.mark.parametrize("regime", REGIMES)
def test_gamma_and_weights_are_those_of_the_float64_solver(regime):
    rng = np.random.default_rng(sum(map(ord, regime)))
    results = [check_against_oracle(random_problem(rng, **REGIMES[regime])) for _ in range(40)]
    if regime == "everyday":
        inside = [conditioning for gamma, conditioning in results if 0 < gamma < 1]
        assert len(inside) > 25
        assert np.median(inside) < 4  # so that the tolerance of most is below 1e-5


@settings(max_examples=200, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 2**32 - 1),
    loss=st.one_of(st.just(0.0), st.floats(-6, 4).map(lambda e: 10.0**e)),
    eta=st.one_of(st.none(), st.floats(-8, 6).map(lambda e: 10.0**e)),
    gradient=st.floats(-12, 12).map(lambda e: 10.0**e),
    decay=st.sampled_from([0.0, 1e-4, 0.03]),
    epsilon=st.sampled_from([0.0, 1e-5]),
    place=st.sampled_from(["inside", "on the bounds", "outside"]),
)
def test_any_mixture_of_scales_agrees_with_the_float64_solver(seed, **setting):
    if setting["decay"] and setting["eta"] is not None:
        setting["eta"] = min(setting["eta"], 30.0)  # eta * decay > 1 amplifies the weights' own rounding
    problem = random_problem(np.random.default_rng(seed), **setting)
    check_against_oracle(problem._replace(decay=np.float32(min(problem.decay, 1 / problem.eta))))


@pytest.mark.parametrize("epsilon", [0.0, 1e-5, 1.0])
def test_the_solver_by_breakpoints_agrees_with_scipy(epsilon):
    rng = np.random.default_rng(7)
    for _ in range(15):
        flat = flatten(random_problem(rng, decay=1e-3, epsilon=epsilon))
        gamma = best_gamma(flat)
        search = scipy.optimize.minimize_scalar(
            lambda g, flat=flat: -dual(flat, g), bounds=(0, 1), method="bounded", options={"xatol": 1e-12}
        )
        assert dual(flat, gamma) >= -search.fun - 1e-12
        if 0 < gamma < 1:
            root = scipy.optimize.brentq(lambda g, flat=flat: dual_slope(flat, g), 0, 1, xtol=1e-15)
            assert gamma == pytest.approx(root, rel=1e-9)


# ---- optimality, without the solver


@pytest.mark.parametrize("setting", [{}, {"decay": 1e-3}, {"place": "outside"}, {"box": False}], ids=str)
def test_gamma_satisfies_the_optimality_conditions_of_the_dual(setting):
    rng = np.random.default_rng(11)
    ends = set()
    for _ in range(60):
        problem = random_problem(rng, **setting)
        flat, gamma = flatten(problem), float(update(problem, zeros())[1].gamma)
        slope, tolerance = dual_slope(flat, gamma), 4e-6 * scale_of_slope(flat, gamma)
        ends.add(gamma if gamma in (0.0, 1.0) else "inside")
        if gamma == 0:
            assert slope <= tolerance
        elif gamma == 1:
            assert slope >= -tolerance
        else:
            assert abs(slope) <= tolerance
    assert {"inside", 1.0} <= ends


def primal(flat: Flat, d: np.ndarray) -> float:
    return d @ d / (2 * flat.eta) + flat.decay * flat.w @ d + max(0.0, flat.loss + flat.delta @ d)


def test_the_duality_gap_of_the_two_piece_problem_is_zero():
    rng = np.random.default_rng(12)
    for _ in range(60):
        problem = random_problem(rng, decay=1e-3, epsilon=0.0)
        flat = flatten(problem)
        new, state = update(problem, zeros())
        d = as_vector(new) - flat.w
        gap = primal(flat, d) - dual(flat, float(state.gamma))
        of_search = 4e-6 * (primal(flat, d) + scale_of_slope(flat, float(state.gamma)))
        of_weights = (
            FLOAT32_EPS * np.abs(flat.w) @ (np.abs(d) / flat.eta + flat.decay * np.abs(flat.w) + np.abs(flat.delta))
        )
        assert -of_weights <= gap <= of_search + of_weights


def test_the_step_minimises_the_primal_proximal_problem():
    rng = np.random.default_rng(13)
    hinged = 0
    for _ in range(8):
        problem = random_problem(rng, decay=1e-2, epsilon=0.0)
        mask = {name: np.zeros(shape, np.float32) for name, shape in SHAPES.items()}
        for name in ("bias", "one", "dense"):
            mask[name].ravel()[:3] = 1
        problem = problem._replace(gradient={name: problem.gradient[name] * mask[name] for name in SHAPES})
        problem = problem._replace(params={name: problem.params[name] * mask[name] for name in SHAPES})
        eta = problem.loss / (np.sum(as_vector(problem.gradient) ** 2) + 0.01) * rng.uniform(1, 8)
        problem = problem._replace(eta=np.float32(eta))
        flat, keep = flatten(problem), as_vector(mask) == 1
        small = flat._replace(
            **{field: getattr(flat, field)[keep] for field in ("w", "delta", "lower", "upper", "decay")}
        )

        def objective(x, small=small):
            return x[:-1] @ x[:-1] / (2 * small.eta) + small.decay * small.w @ x[:-1] + x[-1]

        best = scipy.optimize.minimize(
            objective,
            np.append(np.zeros_like(small.w), small.loss),
            method="SLSQP",
            bounds=[*zip(small.lower - small.w, small.upper - small.w), (0, None)],
            constraints={
                "type": "ineq",
                "fun": lambda x, small=small: x[-1] - small.loss - small.delta @ x[:-1],
            },
            options={"ftol": 1e-14, "maxiter": 500},
        )
        new, state = update(problem, zeros())
        d = (as_vector(new) - flat.w)[keep]
        assert primal(small, d) <= objective(best.x) + 1e-6 * (1 + abs(best.fun))
        np.testing.assert_allclose(d, best.x[:-1], atol=2e-4 * max(1, np.abs(d).max()))
        hinged += 0 < float(state.gamma) < 1
    assert hinged >= 4


# ---- relations


def test_a_box_that_nothing_touches_changes_nothing():
    rng = np.random.default_rng(21)
    wide = {name: (np.float32(-1e4), np.float32(1e4)) for name in BOXED}
    for _ in range(20):
        free = random_problem(rng, decay=1e-3, box=False, epsilon=10.0 ** rng.uniform(-5, 2))
        g, w = as_vector(free.gradient), as_vector(free.params)
        eta, decay, epsilon = float(free.eta), float(free.decay), float(free.epsilon)
        expected = np.clip((float(free.loss) - eta * decay * g @ w) / (eta * g @ g + epsilon), 0, 1)
        for problem in (free, free._replace(bounds=wide)):
            new, state = update(problem, zeros())
            assert float(state.gamma) == pytest.approx(expected, rel=4e-6)
            assert int(state.search_iterations) <= 3  # D' is a line: Newton's first step is exact
            np.testing.assert_allclose(
                as_vector(new), w - eta * (decay * w + expected * g), rtol=1e-5, atol=1e-5 * eta * np.abs(g).max()
            )


def test_the_box_never_shortens_the_step_from_inside_without_decay():
    rng = np.random.default_rng(22)
    longer = 0
    for _ in range(40):
        problem = random_problem(rng)
        boxed = float(update(problem, zeros())[1].gamma)
        free = float(update(problem._replace(bounds={}), zeros())[1].gamma)
        assert boxed >= free * (1 - 4e-6)
        longer += boxed > free * 1.01
    assert longer > 10


def test_units_of_the_loss_do_not_matter():
    rng = np.random.default_rng(23)
    for _ in range(20):
        problem = random_problem(rng, decay=0.5)
        scaled = problem._replace(
            gradient={name: g * np.float32(8) for name, g in problem.gradient.items()},
            loss=problem.loss * np.float32(8),
            decay=problem.decay * np.float32(8),
            epsilon=problem.epsilon * np.float32(8),
            eta=problem.eta / np.float32(8),
        )
        (new, state), (new_scaled, state_scaled) = update(problem, zeros()), update(scaled, zeros())
        assert float(state.gamma) == float(state_scaled.gamma)  # powers of two: the same roundings
        np.testing.assert_array_equal(as_vector(new), as_vector(new_scaled))


def test_a_small_learning_rate_gives_the_step_of_sgd():
    problem = random_problem(np.random.default_rng(24), loss=1.0, eta=1e-5)
    problem = problem._replace(bounds={name: (np.float32(-9), np.float32(9)) for name in BOXED})
    new, state = update(problem, zeros())
    updates, _ = optax.sgd(1e-5).update(problem.gradient, optax.sgd(1e-5).init(problem.params))
    assert float(state.gamma) == 1
    np.testing.assert_allclose(as_vector(new), as_vector(optax.apply_updates(problem.params, updates)), rtol=2e-7)


def test_without_box_decay_and_epsilon_it_is_the_clipped_polyak_step():
    rng = np.random.default_rng(25)
    for _ in range(20):
        problem = random_problem(rng, box=False, epsilon=0.0)
        polyak = optax.polyak_sgd(max_learning_rate=problem.eta)
        expected, _ = polyak.update(problem.gradient, polyak.init(problem.params), problem.params, value=problem.loss)
        new, _ = update(problem, zeros())
        np.testing.assert_allclose(
            as_vector(new), as_vector(optax.apply_updates(problem.params, expected)), rtol=2e-6, atol=1e-6
        )


@pytest.mark.parametrize("setting", [{"gradient": 0.0}, {"loss": 0.0}], ids=str)
def test_without_gradient_or_loss_only_the_velocity_moves(setting):
    problem = random_problem(np.random.default_rng(26), eta=0.3, momentum=0.5, **setting)
    velocity = {name: np.full(shape, 0.125, np.float32) for name, shape in SHAPES.items()}
    new, state = update(problem, velocity)
    assert float(state.gamma) == 0
    for name in SHAPES:
        np.testing.assert_array_equal(state.velocity[name], np.full(SHAPES[name], 0.0625))
        moved = np.clip(problem.params[name] + np.float32(0.5 * 0.0625), *problem.bounds.get(name, (-np.inf, np.inf)))
        np.testing.assert_allclose(new[name], moved, rtol=2e-7)


@pytest.mark.parametrize("setting", [{}, {"decay": 1e-2}, {"place": "outside"}, {"box": False}], ids=str)
def test_momentum_follows_its_float64_twin_over_several_steps(setting):
    rng = np.random.default_rng(31)
    for _ in range(6):
        problem = random_problem(rng, momentum=0.9, **setting)
        w, z, velocity = as_vector(problem.params), 0.0, zeros()
        for _ in range(8):
            fresh = random_problem(rng, **setting)
            problem = problem._replace(gradient=fresh.gradient, loss=fresh.loss)
            flat = flatten(problem)._replace(w=w)
            gamma = best_gamma(flat)
            z = float(problem.momentum) * z - flat.eta * gamma * (flat.delta + flat.decay * w)
            w = np.clip(w + displacement(flat, gamma) + float(problem.momentum) * z, flat.lower, flat.upper)
            new, state = update(problem, velocity)
            assert float(state.gamma) == pytest.approx(gamma, rel=2e-4)
            np.testing.assert_allclose(as_vector(new), w, atol=2e-5 * max(1, np.abs(w).max()))
            np.testing.assert_allclose(as_vector(state.velocity), z, atol=2e-5 * max(1, np.abs(z).max()))
            problem, velocity = problem._replace(params=new), state.velocity


# ---- what is not finite


BAD = {
    "loss nan": (np.nan, 1.0),
    "loss inf": (np.inf, 1.0),
    "loss -inf": (-np.inf, 1.0),
    "gradient nan": (0.5, np.nan),
    "gradient inf": (0.5, np.inf),
    "gradient -inf": (0.5, -np.inf),
    "squared norm overflows": (0.5, 1e25),
    "both nan": (np.nan, np.nan),
}


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("box", [True, False])
def test_a_step_that_is_not_finite_changes_nothing_and_the_next_one_recovers(bad, box):
    loss, entry = BAD[bad]
    good = random_problem(np.random.default_rng(51), momentum=0.9, decay=1e-3, box=box)
    velocity = {name: np.full(shape, 0.01, np.float32) for name, shape in SHAPES.items()}
    gradient = good.gradient | {"dense": good.gradient["dense"].copy()}
    gradient["dense"][1, 2] = entry
    new, state = update(good._replace(loss=np.float32(loss), gradient=gradient), velocity)
    assert float(state.gamma) == 0
    assert int(state.count) == 1
    for name in SHAPES:
        np.testing.assert_array_equal(new[name], good.params[name])
        np.testing.assert_array_equal(state.velocity[name], velocity[name])
    after, undisturbed = update(good._replace(params=new), state.velocity), update(good, velocity)
    chex.assert_trees_all_equal(after, undisturbed)
    assert float(after[1].gamma) > 0


def test_the_largest_finite_gradients_keep_the_weights_finite():
    for gradient in (1e15, 1e17):
        for eta in (1e-8, 1.0, 1e6):
            problem = random_problem(np.random.default_rng(52), gradient=gradient, eta=eta, momentum=0.9)
            new, state = update(problem, zeros())
            assert np.isfinite(as_vector(new)).all()
            assert np.abs(as_vector(new) - as_vector(problem.params)).max() <= 1e-10
            assert 0 <= float(state.gamma) <= 1


@pytest.mark.parametrize("place", ["inside", "on the bounds"])
def test_the_search_takes_few_passes(place):
    rng = np.random.default_rng(61)
    passes = [int(update(random_problem(rng, place=place), zeros())[1].search_iterations) for _ in range(100)]
    assert np.mean(passes) <= 2.8
    assert max(passes) <= 8
