"""Laws of every sign estimator, each against a scalar twin written from the published formula."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bnn_jax.estimators import ESTIMATORS, make_sign, sign, ste_sign

DERIVATIVES = {
    "identity_sign": lambda x: 1.0,
    "ste_sign": lambda x: 1.0 if abs(x) <= 1.0 else 0.0,
    "approx_sign": lambda x: 2.0 - 2.0 * abs(x) if abs(x) <= 1.0 else 0.0,
}
AREAS = {"identity_sign": np.inf, "ste_sign": 2.0, "approx_sign": 2.0}

ONE = np.float32(1.0)
GRID = np.array(
    [
        *np.linspace(-3, 3, 61),
        0.0,
        -0.0,
        *(s * np.nextafter(ONE, t) for s in (-1, 1) for t in (np.float32(0), ONE, np.float32(2))),
        1e4,
        -1e4,
        np.finfo(np.float32).tiny,
        -np.finfo(np.float32).tiny,  # XLA takes smaller ones, the subnormals, for zero
    ],
    np.float32,
)


def derivative_of(estimator, x):
    return jax.vmap(jax.grad(estimator))(x)


def test_every_estimator_has_a_twin():
    assert set(ESTIMATORS) == set(DERIVATIVES) == set(AREAS)


@pytest.mark.parametrize("name", ESTIMATORS)
def test_forward_is_the_two_valued_sign(name):
    codes = np.asarray(ESTIMATORS[name](jnp.asarray(GRID)))
    np.testing.assert_array_equal(codes, np.where(GRID < 0, -1.0, 1.0))
    assert codes.dtype == np.float32


@pytest.mark.parametrize("name", ESTIMATORS)
def test_gradient_equals_the_scalar_twin(name):
    expected = [DERIVATIVES[name](float(x)) for x in GRID]
    np.testing.assert_allclose(derivative_of(ESTIMATORS[name], jnp.asarray(GRID)), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", [name for name in ESTIMATORS if np.isfinite(AREAS[name])])
def test_integral_of_the_derivative(name):
    x = np.linspace(-4, 4, 800_001, dtype=np.float32)
    area = np.trapezoid(np.asarray(derivative_of(ESTIMATORS[name], jnp.asarray(x)), np.float64), x.astype(np.float64))
    assert area == pytest.approx(AREAS[name], abs=1e-4)


@pytest.mark.parametrize("name", ESTIMATORS)
def test_bfloat16_jit_vmap_and_second_call(name):
    estimator = ESTIMATORS[name]
    x = jnp.asarray(GRID, jnp.bfloat16)
    assert estimator(x).dtype == jnp.bfloat16
    assert derivative_of(estimator, x).dtype == jnp.bfloat16
    jitted = jax.jit(lambda x: derivative_of(estimator, x))
    y = jnp.asarray(GRID)
    np.testing.assert_array_equal(jitted(y), derivative_of(estimator, y))
    jitted(y + 1)
    assert jitted._cache_size() == 1
    np.testing.assert_array_equal(jax.vmap(estimator)(y), estimator(y))


def test_a_traced_clip_value_does_not_recompile():
    slope = jax.jit(lambda x, clip: jax.grad(lambda x: ste_sign(x, clip_value=clip).sum())(x))
    x = jnp.array([0.5, 1.2, 2.0])
    np.testing.assert_array_equal(slope(x, 1.0), [1, 0, 0])
    np.testing.assert_array_equal(slope(x, 1.25), [1, 1, 0])
    np.testing.assert_array_equal(slope(x, 2.0), [1, 1, 1])
    assert slope._cache_size() == 1


def test_make_sign_from_a_derivative():
    estimator = make_sign(lambda x, temperature: 1 / jnp.cosh(x / temperature) ** 2)
    x = jnp.array([-1.0, 0.0, 2.0])
    gradient = jax.grad(lambda x: estimator(x, temperature=2.0).sum())(x)
    np.testing.assert_allclose(gradient, 1 / np.cosh(np.array([-0.5, 0.0, 1.0])) ** 2, rtol=1e-6)
    np.testing.assert_array_equal(estimator(x, temperature=2.0), [-1, 1, 1])


@pytest.mark.parametrize("clip_value", [0, -1.0, float("nan")])
def test_clip_value_must_be_positive(clip_value):
    with pytest.raises(ValueError, match=r"`clip_value` \(=.*\) must be positive; 1\.0 is the usual choice"):
        ste_sign(jnp.ones(2), clip_value=clip_value)


@pytest.mark.parametrize("estimator", [sign, *ESTIMATORS.values()])
def test_integers_are_refused(estimator):
    with pytest.raises(TypeError, match=r"`x` must be a floating-point array; got int32"):
        estimator(jnp.arange(3))
