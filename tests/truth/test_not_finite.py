"""Numbers that are not finite are seen: no code, mask, step, evaluation or file makes a plausible number of them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bnn_jax.estimators import ESTIMATORS, sign
from bnn_jax.quantizers import (
    ACTIVATION_QUANTIZERS,
    GRADIENT_QUANTIZERS,
    WEIGHT_QUANTIZERS,
    dequantize,
    make_quantizer,
)

SHAPE, WHERE = (2, 2, 3, 4), (1, 0, 2, 1)
QUANTIZERS = [(table, name) for table in (WEIGHT_QUANTIZERS, ACTIVATION_QUANTIZERS) for name in table]
OPTIONS = [
    (WEIGHT_QUANTIZERS, "binary_connect", {"stochastic": True}),
    (WEIGHT_QUANTIZERS, "dorefa", {"bits": 1}),
    (WEIGHT_QUANTIZERS, "xnor", {"center": True, "gradient": "diagonal"}),
]
REAL_IN_TRAINING = ("post_training", "inq")
CASES = [(t, n, {}) for t, n in QUANTIZERS if n != "full_precision" and n not in ESTIMATORS] + OPTIONS


def with_nan():
    x = np.random.default_rng(0).normal(size=SHAPE).astype(np.float32)
    x[WHERE] = np.nan
    return jnp.asarray(x)


@pytest.mark.parametrize("name", ESTIMATORS)
def test_the_code_and_the_slope_of_nan_are_nan(name):
    x = with_nan()

    @jax.jit
    def run(x, cotangent):
        codes, pullback = jax.vjp(ESTIMATORS[name], x)
        return codes, *pullback(cotangent)

    codes, slope = run(x, jnp.ones_like(x))
    _, passed_on = run(jnp.full_like(x, 9.0), x)  # where the masks are 0
    assert jnp.isnan(passed_on[WHERE])
    np.testing.assert_array_equal(jnp.isnan(codes), jnp.isnan(x))
    assert jnp.isnan(slope[WHERE])


def test_sign_is_that_of_other_libraries_at_nan_and_plus_one_at_both_zeros():
    x = jnp.array([jnp.nan, 0.0, -0.0, jnp.inf, -jnp.inf])
    for dtype in (jnp.float32, jnp.bfloat16):
        np.testing.assert_array_equal(np.asarray(sign(x.astype(dtype)), np.float32), [np.nan, 1, 1, 1, -1])


@pytest.mark.parametrize("parameter", ["threshold", "width"])
def test_a_parameter_that_is_nan_makes_codes_nan(parameter):
    x = jnp.array([-1.0, 2.0])
    values = jax.jit(lambda value: ESTIMATORS["heaviside"](x, **{parameter: value}))(jnp.nan)
    assert jnp.isnan(values).all()


@pytest.mark.parametrize(("table", "name", "options"), CASES)
def test_what_a_quantizer_makes_of_nan_is_nan_forward_and_backward(table, name, options):
    quantizer, x, key = make_quantizer(table, name, **options), with_nan(), jax.random.key(0)
    healthy = jnp.where(jnp.isnan(x), 0.5, x)
    parameters = quantizer.init(key, healthy) if quantizer.init else {}
    state = (quantizer.init_state(key, healthy),) if quantizer.init_state else ()

    def values(x, train):
        wanted = {"train": train, "progress": 0.5, "key": key if train else None}
        given = {name: wanted[name] for name in quantizer.wants} | parameters
        found = quantizer.apply(x, *state, **given)
        return dequantize(found[0] if state else found)

    @jax.jit
    def run(x):
        trained, pullback = jax.vjp(lambda x: values(x, True), x)
        return values(x, False), trained, *pullback(jnp.ones_like(x))

    evaluated, trained, gradient = run(x)
    assert jnp.isnan(evaluated[WHERE]) and jnp.isnan(trained[WHERE])
    assert jnp.isnan(gradient[WHERE]) or name in REAL_IN_TRAINING


def test_a_gradient_quantizer_passes_nan_on():
    quantize = make_quantizer(GRADIENT_QUANTIZERS, "dorefa")
    _, pullback = jax.vjp(lambda y: quantize(y, jax.random.key(0)), jnp.ones(SHAPE))
    assert jnp.isnan(pullback(with_nan())[0][WHERE])
