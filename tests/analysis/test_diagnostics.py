"""Diagnostics against closed forms, scalar float64 differences and trees made by hand."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bnn_jax.analysis.diagnostics import coordinate_discrete_gradient, flip_rate, gradient_cosine
from bnn_jax.estimators import approx_sign, identity_sign, sign, ste_sign

RNG = np.random.default_rng(0)


# -- coordinate discrete gradient


def test_it_is_the_gradient_of_a_quadratic_for_every_step():
    a = RNG.normal(size=(3, 4)).astype(np.float32)
    x = RNG.normal(size=(3, 4)).astype(np.float32)
    for step in (0.5, 2.0):
        found = coordinate_discrete_gradient(lambda v: (a * v**2).sum(), jnp.asarray(x), step=step)
        np.testing.assert_allclose(found, 2 * a * x, rtol=1e-4, atol=1e-5)


def test_of_a_sum_of_signs_it_is_a_box_of_the_jump_s_area():
    """(sign(x + s) - sign(x - s)) / (2 s) is 1/s on [-s, s), and 0 outside."""
    x = jnp.array([-2.0, -0.51, -0.5, -0.25, 0.0, 0.25, 0.49, 0.5, 2.0])
    weights = jnp.arange(1.0, 10.0)
    found = coordinate_discrete_gradient(lambda v: (weights * sign(v)).sum(), x, step=0.5)
    np.testing.assert_array_equal(found, 2 * weights * jnp.array([0, 0, 1, 1, 1, 1, 1, 0, 0.0]))


def test_it_is_the_derivative_of_the_loss_averaged_over_the_step():
    """Against float64 quadrature of the averaged staircase, differentiated by Leibniz's rule between its ends."""
    x, step, width = 0.41, 0.7, 1e-3

    def staircase(v):
        return np.floor(3 * v)

    def averaged(centre):
        grid = centre + step * np.linspace(-1, 1, 2_000_001)
        return np.trapezoid(staircase(grid), grid) / (2 * step)

    expected = (averaged(x + width) - averaged(x - width)) / (2 * width)
    found = coordinate_discrete_gradient(lambda v: jnp.floor(3 * v[0]), jnp.array([x]), step=step)
    np.testing.assert_allclose(found, [expected], rtol=1e-3)


def test_it_matches_a_float64_twin_on_a_network_with_binary_activations():
    images, kernel = RNG.normal(size=(20, 5)), RNG.normal(size=(5, 3))
    head = RNG.normal(size=3)
    step = 0.2

    def twin(w):
        return np.mean((np.where(images @ w < 0, -1.0, 1.0) @ head) ** 2)

    expected = np.zeros_like(kernel)
    for index in np.ndindex(*kernel.shape):
        move = np.zeros_like(kernel)
        move[index] = step
        expected[index] = (twin(kernel + move) - twin(kernel - move)) / (2 * step)

    def loss(w):
        return ((sign(jnp.asarray(images, jnp.float32) @ w) @ jnp.asarray(head, jnp.float32)) ** 2).mean()

    found = coordinate_discrete_gradient(loss, jnp.asarray(kernel, jnp.float32), step=step)
    assert found.shape == kernel.shape
    assert np.count_nonzero(expected) > 10
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("estimator", [ste_sign, approx_sign, identity_sign])
def test_the_chosen_derivative_does_not_enter(estimator):
    x = jnp.asarray(RNG.normal(size=6), jnp.float32)
    of_sign, of_estimator = (
        coordinate_discrete_gradient(lambda v, f=f: (f(v) * jnp.arange(6.0)).sum() ** 2, x, step=0.4)
        for f in (sign, estimator)
    )
    np.testing.assert_array_equal(of_sign, of_estimator)


def test_a_new_step_does_not_recompile():
    traced = []

    @jax.jit
    def slope(x, step):
        traced.append(step)
        return coordinate_discrete_gradient(lambda v: (v**3).sum(), x, step=step)

    x = jnp.array([1.0, 2.0])
    np.testing.assert_allclose(slope(x, 0.5), 3 * x**2 + 0.25, rtol=1e-5)  # ((x+s)^3 - (x-s)^3) / 2s = 3x^2 + s^2
    np.testing.assert_allclose(slope(x, 1.0), 3 * x**2 + 1.0, rtol=1e-5)
    assert len(traced) == 1


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_the_dtype_is_kept(dtype):
    found = coordinate_discrete_gradient(lambda v: (v * v).sum(), jnp.array([[1.0], [-2.0]], dtype), step=0.5)
    assert (found.dtype, found.shape) == (dtype, (2, 1))
    np.testing.assert_array_equal(found.astype(jnp.float32), [[2.0], [-4.0]])


@pytest.mark.usefixtures("unchecked")
def test_bad_values_are_refused():
    total = jnp.sum
    with pytest.raises(ValueError, match=r"`step` \(=0\.0\) must be positive; a few hundredths suit"):
        coordinate_discrete_gradient(total, jnp.ones(2), step=0.0)
    with pytest.raises(TypeError, match=r"`x` must be a floating-point array; got int32; convert it with `\.astype`"):
        coordinate_discrete_gradient(total, jnp.ones(2, jnp.int32), step=0.5)


# -- cosine


def test_the_cosine_is_numpy_s_over_all_leaves_together():
    a = {"x": RNG.normal(size=(3, 2)), "y": [RNG.normal(size=4)]}
    b = {"x": RNG.normal(size=(3, 2)), "y": [RNG.normal(size=4)]}
    p, q = (np.concatenate([t["x"].ravel(), t["y"][0]]) for t in (a, b))
    as_float32 = partial(jax.tree.map, lambda leaf: jnp.asarray(leaf, jnp.float32))
    expected = p @ q / np.linalg.norm(p) / np.linalg.norm(q)
    np.testing.assert_allclose(gradient_cosine(as_float32(a), as_float32(b)), expected, rtol=1e-5)


@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
def test_the_cosine_does_not_depend_on_sizes(scale):
    a = jnp.array([3.0, 4.0])
    np.testing.assert_allclose(gradient_cosine(scale * a, jnp.array([1.0, 0.0])), 0.6, rtol=1e-6)
    np.testing.assert_allclose(gradient_cosine(scale * a, -a), -1.0, rtol=1e-6)


def test_a_zero_gradient_has_cosine_zero():
    assert gradient_cosine(jnp.zeros(3), jnp.ones(3)) == 0
    assert gradient_cosine(jnp.ones(3), jnp.zeros(3)) == 0


def test_an_estimator_with_the_box_of_the_step_has_cosine_one():
    """The clipped straight-through estimator of width s is, in one layer, the CDG of step s."""
    x = jnp.array([-0.7, -0.3, 0.1, 0.4, 0.9])
    weights = jnp.array([1.0, -2.0, 3.0, 0.5, 4.0])

    def loss(v, estimator):
        return (weights * estimator(v)).sum()

    reference = coordinate_discrete_gradient(partial(loss, estimator=sign), x, step=0.5)
    matching = jax.grad(loss)(x, partial(ste_sign, clip_value=0.5))
    unclipped = jax.grad(loss)(x, identity_sign)
    np.testing.assert_allclose(gradient_cosine(matching, reference), 1.0, rtol=1e-6)
    inside = 4.0 + 9.0 + 0.25
    np.testing.assert_allclose(gradient_cosine(unclipped, reference), (inside / (inside + 17.0)) ** 0.5, rtol=1e-6)


# -- flip rate


def params(first, second, head=1.0):
    return {
        "conv1": {"latent_kernel": jnp.array(first)},
        "conv2": {"latent_kernel": jnp.array(second)},
        "head": {"kernel": jnp.array([head]), "bias": jnp.array([head])},
    }


@pytest.mark.parametrize(
    ("first", "second", "rate"),
    [
        ([0.5, -0.5, 1.0], [-2.0], 0.0),
        ([0.1, -0.9, 9.0], [-0.1], 0.0),
        ([-0.5, -0.5, 1.0], [-2.0], 0.25),
        ([-0.5, 0.5, -1.0], [2.0], 1.0),
        ([0.5, 0.0, 1.0], [-2.0], 0.25),
        ([0.5, -0.0, 1.0], [-2.0], 0.25),
        ([-0.0, -0.5, 0.0], [-2.0], 0.0),
    ],
)
def test_flips_are_counted_over_all_latent_weights(first, second, rate):
    before = params([0.5, -0.5, 1.0], [-2.0])
    after = params(first, second, head=-1.0)
    assert flip_rate(before, after) == rate
    assert flip_rate(after, before) == rate
    assert jax.jit(flip_rate)(before, after) == rate


def test_what_does_not_go_together_is_refused():
    latent = {"latent_kernel": jnp.ones(2)}
    with pytest.raises(ValueError, match=r"`before` and `after` must have equal shapes; got .*\(2,\).* and .*\(3,\)"):
        flip_rate(latent, {"latent_kernel": jnp.ones(3)})
    with pytest.raises(ValueError, match=r"`before` and `after` must be trees of the same structure"):
        flip_rate(latent, {"kernel": jnp.ones(2)})
    with pytest.raises(ValueError, match=r"`before` must hold latent weights, in leaves named `latent_kernel`"):
        flip_rate({"kernel": jnp.ones(2)}, {"kernel": jnp.ones(2)})
    with pytest.raises(ValueError, match=r"`chosen` and `reference` must be trees of the same structure"):
        gradient_cosine(latent, jnp.ones(2))
