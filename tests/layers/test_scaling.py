"""The four learned output scales: shapes, sizes, product rule, and what a batch normalization absorbs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bnn_jax.layers.norm import BatchNorm
from bnn_jax.layers.scaling import OutputScale, output_scale_shapes

H, W, C = 4, 3, 5
CASES = (1, 2, 3, 4)


@pytest.fixture(scope="module")
def y():
    return jnp.asarray(np.random.default_rng(0).normal(size=(2, H, W, C)), jnp.float32)


def random_factors(case, seed=1):
    rng = np.random.default_rng(seed)
    shapes = output_scale_shapes(case, (H, W, C))
    return {name: jnp.asarray(rng.uniform(0.5, 2, shape), jnp.float32) for name, shape in shapes.items()}


def gamma(case, factors):
    """Gamma of shape (height, width, features), by loops over its definition."""
    f = {name: np.asarray(value, np.float64).squeeze() for name, value in factors.items()}
    out = np.empty((H, W, C))
    for i, j, o in np.ndindex(H, W, C):
        if case == 1:
            out[i, j, o] = f["scale"][o]
        elif case == 2:
            out[i, j, o] = f["scale"][i, j, o]
        elif case == 3:
            out[i, j, o] = f["scale"][o] * f["spatial_scale"][i, j]
        else:
            out[i, j, o] = f["scale"][o] * f["row_scale"][i] * f["column_scale"][j]
    return out


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_starts_as_the_identity_and_keeps_the_dtype(y, case, dtype):
    out, variables = OutputScale(case=case).init_with_output(jax.random.key(0), y.astype(dtype))
    assert out.dtype == dtype
    np.testing.assert_array_equal(out, y.astype(dtype))
    assert {name: p.shape for name, p in variables["params"].items()} == output_scale_shapes(case, (H, W, C))


@pytest.mark.parametrize(("case", "count"), [(1, C), (2, C * H * W), (3, C + H * W), (4, C + H + W)])
def test_number_of_parameters(y, case, count):
    params = OutputScale(case=case).init(jax.random.key(0), y)["params"]
    assert sum(p.size for p in jax.tree.leaves(params)) == count


@pytest.mark.parametrize("case", CASES)
def test_forward_and_product_rule(y, case):
    factors, g = random_factors(case), np.random.default_rng(2).normal(size=y.shape)

    def loss(factors, y):
        out = OutputScale(case=case).apply({"params": factors}, y)
        return (out * jnp.asarray(g, jnp.float32)).sum(), out

    (df, dy), out = jax.jit(jax.grad(loss, argnums=(0, 1), has_aux=True))(factors, y)
    y64 = np.asarray(y, np.float64)
    np.testing.assert_allclose(out, gamma(case, factors) * y64, rtol=1e-5)
    np.testing.assert_allclose(dy, gamma(case, factors) * g, rtol=1e-5)
    to_gamma = (g * y64).sum(0)
    for name, factor in factors.items():
        for index in np.ndindex(factor.shape):
            step = np.zeros(factor.shape)
            step[index] = 1.0  # Gamma is linear in each factor: a difference of step one is its derivative
            moved = {n: np.asarray(f, np.float64) for n, f in factors.items()}
            moved[name] = moved[name] + step
            expected = ((gamma(case, moved) - gamma(case, factors)) * to_gamma).sum()
            np.testing.assert_allclose(df[name][index], expected, rtol=1e-4, atol=1e-5)


def test_a_batch_normalization_absorbs_a_positive_case_1(y):
    factors = random_factors(1)
    norm = BatchNorm(epsilon=1e-12)
    variables = norm.init(jax.random.key(0), y, train=False)
    normalized = lambda y: norm.apply(variables, y, train=True, mutable=["batch_stats"])[0]
    scaled = OutputScale(case=1).apply({"params": factors}, y)
    assert not np.allclose(scaled, y)
    np.testing.assert_allclose(normalized(scaled), normalized(y), rtol=1e-4, atol=1e-5)


def test_case_1_takes_dense_outputs_and_any_resolution(y):
    module = OutputScale(case=1)
    dense = jnp.ones((2, C))
    assert module.init(jax.random.key(0), dense)["params"]["scale"].shape == (C,)
    np.testing.assert_array_equal(module.apply({"params": {"scale": jnp.arange(5.0)}}, dense), [[0, 1, 2, 3, 4]] * 2)
    variables = module.init(jax.random.key(0), y)
    assert module.apply(variables, y[:, :2]).shape == (2, 2, W, C)


@pytest.mark.parametrize("case", [2, 3, 4])
def test_another_size_is_refused(y, case):
    module = OutputScale(case=case)
    variables = module.init(jax.random.key(0), y)
    message = rf"`case` \(={case}\) was initialized for other outputs: \w+ has the shape .*; use case 1, which fits"
    with pytest.raises(ValueError, match=message):
        module.apply(variables, y[:, :2])


def test_error_texts():
    with pytest.raises(ValueError, match=r"`case` \(=5\) must be 1, 2, 3 or 4; 4 was the best in the paper"):
        OutputScale(case=5)
    with pytest.raises(
        ValueError, match=r"`case` \(=4\) needs outputs with height, width and features, not of shape \(7,\)"
    ):
        OutputScale(case=4).init(jax.random.key(0), jnp.ones((2, 7)))
