"""BiT's elastic binarization against a scalar float64 twin of the authors' formulas."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bnn_jax.quantizers import dequantize
from bnn_jax.quantizers.elastic import elastic, elastic_binary


def twin(x, a, b, signed):
    """(value, dvalue/dx, dvalue/da) of one number."""
    z = x - b
    if signed:
        code = -1.0 if z < 0 else 1.0
        return a * code, float(-a <= z <= a), code
    ratio = z / a
    code = float(round(min(max(ratio, 0.0), 1.0)))
    inside = 0 < ratio < 1
    return a * code, float(inside), code - ratio if inside else code


@pytest.mark.parametrize("signed", [True, False])
def test_value_and_gradients_are_the_authors(signed):
    rng = np.random.default_rng(0)
    x, g = (rng.normal(size=(6, 5)).astype(np.float32) for _ in range(2))
    a, b = np.float32(0.8), rng.normal(0, 0.3, (1, 5)).astype(np.float32)

    def loss(x, a, b):
        value = dequantize(elastic_binary(x, a, b, signed=signed, gradient_scale=0.25))
        return (value * g).sum(), value

    (dx, da, db), value = jax.grad(loss, argnums=(0, 1, 2), has_aux=True)(*map(jnp.asarray, (x, a, b)))
    expected = [[twin(float(v), float(a), float(b[0, j]), signed) for j, v in enumerate(row)] for row in x]
    values, by_x, by_a = np.moveaxis(np.array(expected), -1, 0)
    np.testing.assert_allclose(value, values, rtol=1e-6)
    np.testing.assert_allclose(dx, by_x * g, rtol=1e-5)
    np.testing.assert_allclose(da, 0.25 * (by_a * g).sum(), rtol=1e-4)
    np.testing.assert_allclose(db, -(by_x * g).sum(0, keepdims=True), rtol=1e-4, atol=1e-6)


def test_the_quantizer_from_zero_has_its_codes():
    quantizer, x = elastic(signed=False), jnp.asarray(np.random.default_rng(0).normal(size=(4, 8)), jnp.float32)
    found = quantizer.apply(x, **quantizer.init(jax.random.key(0), x))
    assert quantizer.code_set == (0, 1) and set(np.unique(found.codes)) <= {0.0, 1.0}
