"""Laws of every estimator, each against a scalar float64 twin written from the published formula."""

import inspect
import math
from functools import cache, partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from bnn_jax.estimators import (
    ESTIMATORS,
    heaviside,
    sign,
    swish_sign,
)

TRAINED = [(name, parameter) for name, estimator in ESTIMATORS.items() for parameter in estimator.trainable]


def sigmoid(z):
    return 1 / (1 + math.exp(-z)) if z >= 0 else math.exp(z) / (1 + math.exp(z))


def swish_slope(x, b=5.0):
    z = max(-500.0, min(500.0, b * x))
    return b * (2 - z * math.tanh(z / 2)) / (1 + math.cosh(z))


def swish(x, b=5.0):
    return 2 * sigmoid(b * x) * (1 + b * x * (1 - sigmoid(b * x))) - 1


def approx(x):
    return math.copysign(2 * abs(x) - x * x if abs(x) < 1 else 1.0, x)


def rbnn(x, t=1.0, k=1.0):
    half = -math.copysign(1, x) * t * t * x * x / 2 + math.sqrt(2) * t * x
    return k * (half if abs(x) < math.sqrt(2) / t else math.copysign(1, x))


def long_tailed_slope(x):
    return 2 - 4 * abs(x) if abs(x) <= 0.4 else 0.4 if abs(x) <= 1 else 0.0


def long_tailed(x):
    a = min(abs(x), 1.0)
    return math.copysign(2 * a - 2 * a * a if a <= 0.4 else 0.48 + 0.4 * (a - 0.4), x)


def fda_slope(x, n=9, w=0.1):
    return 4 * w / math.pi * sum(math.cos((2 * i + 1) * w * x) for i in range(n + 1)) if abs(x) <= 1 else 0.0


def fda(x, n=9, w=0.1):
    x = max(-1.0, min(1.0, x))
    return 4 / math.pi * sum(math.sin((2 * i + 1) * w * x) / (2 * i + 1) for i in range(n + 1))


def clip(x, c=1.0):
    return max(-c, min(c, x))


def state_aware(x, positive=1.2, negative=0.8):
    return clip(x) * (positive if x >= 0 else negative)


def on_ramp(x, width=1.0, threshold=0.0, rho=0.3):
    return 1 / width if -rho * width < x - threshold < width else 0.0


def ramp(x, width=1.0, threshold=0.0, rho=0.3):
    return max(-rho, min(1.0, (x - threshold) / width))


def triangles(x, delta=0.4):
    doubled = 2 * abs(math.fmod(x / delta + 3, 2) - 1) if abs(x) <= 2 * delta else 0.0
    return doubled / (2 * delta)


def triangle_steps(x, delta=0.4):
    a = min(abs(x) / delta, 2.0)
    return math.copysign(a * a / 2 if a <= 1 else 1 - (2 - a) ** 2 / 2, x)


class Law(NamedTuple):
    """One estimator at one choice of parameters; no parameters means that the twin has the published defaults."""

    name: str
    parameters: dict
    derivative: object  # scalar f'
    surrogate: object  # scalar F with F' = f'
    area: float  # over [-20, 20]
    kinks: tuple  # where f' jumps or bends

    def estimator(self, x):
        return ESTIMATORS[self.name](x, **self.parameters)


def tanh_law(name, parameters, slope, peak, area):
    """The estimators whose surrogate is a multiple of tanh(slope x)."""

    def derivative(x):
        return peak * (1 - math.tanh(slope * x) ** 2)

    return Law(name, parameters, derivative, lambda x: peak / slope * math.tanh(slope * x), area, ())


LAWS = [
    Law("identity_sign", {}, lambda x: 1.0, lambda x: x, 40.0, ()),
    Law("ste_sign", {}, lambda x: float(abs(x) <= 1), clip, 2.0, (1,)),
    Law("ste_sign", {"clip_value": 1.25}, lambda x: float(abs(x) <= 1.25), partial(clip, c=1.25), 2.5, (1.25,)),
    Law("approx_sign", {}, lambda x: 2 - 2 * abs(x) if abs(x) <= 1 else 0.0, approx, 2.0, (0, 1)),
    tanh_law("tanh_sign", {}, 1, 1, 2),
    tanh_law("tanh_sign", {"slope": 3.0}, 3, 3, 2),
    tanh_law("cosh_sign", {}, 1, 4, 8),
    tanh_law("cosh_sign", {"scale": 1.0}, 1, 1, 2),
    Law("swish_sign", {}, swish_slope, swish, 2.0, ()),
    Law("swish_sign", {"beta": 2.0}, partial(swish_slope, b=2.0), partial(swish, b=2.0), 2.0, ()),
    tanh_law("ede_sign", {}, 1, 1, 2),
    tanh_law("ede_sign", {"t": 0.5, "k": 2.0}, 0.5, 1, 4),
    tanh_law("ede_sign", {"t": 10.0}, 10, 10, 2),
    Law("rbnn_sign", {}, lambda x: max(0.0, 2**0.5 - abs(x)), rbnn, 2.0, (0, 2**0.5)),
    Law(
        "rbnn_sign",
        {"t": 2.0, "k": 0.5},
        lambda x: 0.5 * max(0.0, 2**0.5 * 2 - 4 * abs(x)),
        partial(rbnn, t=2.0, k=0.5),
        1.0,
        (0, 2**-0.5),
    ),
    tanh_law("gumbel_sign", {}, 1, 1, 2),
    tanh_law("gumbel_sign", {"temperature": 0.25}, 4, 4, 2),
    tanh_law("dir_sign", {}, 1, 1, 2),  # the test points are spread widely: the bound of t does not bind
    Law("long_tailed_sign", {}, long_tailed_slope, long_tailed, 1.44, (0, 0.4, 1)),
    Law("fda_sign", {}, fda_slope, fda, 2.04500, (1,)),
    Law("fda_sign", {"terms": 19}, partial(fda_slope, n=18), partial(fda, n=18), 2.28377, (1,)),
    Law("fda_sign", {"frequency": 0.5}, partial(fda_slope, w=0.5), partial(fda, w=0.5), 2 * fda(1, w=0.5), (1,)),
    Law("state_aware_sign", {}, lambda x: float(abs(x) <= 1) * (1.2 if x >= 0 else 0.8), state_aware, 2.0, (0, 1)),
    Law("heaviside", {}, on_ramp, ramp, 1.3, (-0.3, 1)),
    Law(
        "heaviside",
        {"width": 0.5, "threshold": 0.25, "rho": 0.5},
        partial(on_ramp, width=0.5, threshold=0.25, rho=0.5),
        partial(ramp, width=0.5, threshold=0.25, rho=0.5),
        1.5,
        (0, 0.25, 0.75),
    ),
    Law("coupled_ternary", {}, lambda x: 2.0 * (0 <= x <= 1), lambda x: 2 * max(0, min(1, x)), 2.0, (0, 0.25, 0.75, 1)),
    Law("ternary", {}, triangles, triangle_steps, 2.0, (0, 0.4, 0.8)),
    Law("ternary", {"delta": 1.5}, partial(triangles, delta=1.5), partial(triangle_steps, delta=1.5), 2.0, (0, 1.5, 3)),
    Law("ternary", {"straight_through": True}, lambda x: float(abs(x) <= 1), clip, 2.0, (0.4, 1)),
]
EVERY = pytest.mark.parametrize("law", LAWS, ids=lambda law: "-".join([law.name, *map(str, law.parameters.values())]))

EACH = pytest.mark.parametrize("law", [law for law in LAWS if not law.parameters], ids=lambda law: law.name)


def grid_of(law):
    """200 points: kinks and their neighbours of one ulp, zeros, far ends, an even spread."""
    kinks = np.array([*law.kinks, *(-np.array(law.kinks))], np.float32)
    beside = np.ravel([np.nextafter(kinks, np.float32(way)) for way in (-9, 9)])
    tiny = np.finfo(np.float32).tiny  # XLA takes smaller ones, the subnormals, for zero
    beside = np.where(np.abs(beside) < tiny, np.copysign(tiny, beside), beside)
    special = [0.0, -0.0, 1e4, -1e4, tiny, -tiny, *kinks, *beside]
    return np.array([*special, *np.linspace(-4, 4, 200 - len(special))], np.float32)


@cache
def program_of(number):
    """(x, g) -> codes of 200 points, and the gradients that the cotangents 1 and g of all codes become."""

    def run(x, g):
        codes, pull_back = jax.vjp(LAWS[number].estimator, x)
        return codes, pull_back(jnp.ones_like(x))[0], pull_back(jnp.full_like(x, g))[0]

    return jax.jit(run)


def codes_and_gradients(law, x, g=1.0):
    return program_of(LAWS.index(law))(x, np.float32(g))


def derivative_of(estimator, x):
    return jax.grad(lambda x: estimator(x).sum())(x)


def published_codes(name, x, delta=0.4, threshold=0.0):
    """float64 codes of float32 x; none of the parameters is rounded to float32 beforehand."""
    x = x.astype(np.float64)
    if name == "heaviside":
        return (x > threshold).astype(float)
    if name == "coupled_ternary":
        return np.floor(2 * np.clip(x, 0, 1) + 0.5)
    if name == "ternary":
        return (x >= delta).astype(float) - (x <= -delta)
    return np.where(x < 0, -1.0, 1.0)


def test_every_entry_of_the_tables_has_its_law():
    assert set(ESTIMATORS) == {law.name for law in LAWS if not law.parameters}
    for estimator in ESTIMATORS.values():
        options = set(inspect.signature(estimator.apply).parameters) - {"x"}
        assert estimator.stochastic == ("key" in options)
        assert set(estimator.trainable) <= options
        assert estimator.schedule is None or set(estimator.schedule(0.5)) <= options


@pytest.mark.default_flags
@EVERY
def test_forward_is_the_published_step(law):
    x = grid_of(law)
    given = {name: value for name, value in law.parameters.items() if name in ("delta", "threshold")}
    codes = np.asarray(codes_and_gradients(law, x)[0])
    np.testing.assert_array_equal(codes, published_codes(law.name, x, **given))
    assert codes.dtype == np.float32
    assert set(np.unique(codes)) == set(ESTIMATORS[law.name].code_set)


@EVERY
def test_gradient_equals_the_scalar_twin(law):
    x = grid_of(law)
    expected = [law.derivative(float(value)) for value in x]
    np.testing.assert_allclose(codes_and_gradients(law, x)[1], expected, rtol=1e-6, atol=1e-6)


@EVERY
def test_gradient_equals_finite_differences_of_the_surrogate(law):
    x = np.linspace(-2.4977, 2.5011, 220, dtype=np.float32)
    kinks = np.array([*law.kinks, *(-np.array(law.kinks)), 99.0])
    x = x[np.abs(x[:, None] - kinks).min(axis=1) > 1e-3][:200]
    h = 1e-5
    slope = [(law.surrogate(float(v) + h) - law.surrogate(float(v) - h)) / (2 * h) for v in x]
    np.testing.assert_allclose(codes_and_gradients(law, x)[1], slope, rtol=1e-6, atol=2e-6)


@EVERY
def test_integral_of_the_derivative(law):
    x = np.linspace(-20, 20, 800_001, dtype=np.float32)
    slope = np.asarray(derivative_of(law.estimator, jnp.asarray(x)), np.float64)
    assert np.trapezoid(slope, x.astype(np.float64)) == pytest.approx(law.area, abs=2e-4)


@EVERY
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_narrow_dtypes_neither_overflow_nor_round_twice(law, dtype):
    near, g = np.random.default_rng(0).normal(size=(2, 200))
    x = jnp.asarray(np.r_[-1e4, 1e4, 0.0, -0.0, near[4:]], dtype)
    g = jnp.asarray(g, dtype)
    codes, vjp = jax.vjp(law.estimator, x)
    slope = vjp(g)[0]
    assert codes.dtype == slope.dtype == dtype
    if ESTIMATORS[law.name].code_set == (-1, 1):
        np.testing.assert_array_equal(codes[2:4].astype(jnp.float32), [1, 1])
    expected = [a * law.derivative(b) for a, b in zip(g.astype(jnp.float32).tolist(), x.astype(jnp.float32).tolist())]
    half_ulp = float(jnp.finfo(dtype).eps) / 2
    np.testing.assert_allclose(slope.astype(jnp.float32), expected, rtol=1.01 * half_ulp, atol=1e-6)


@EACH
def test_jit_vmap_and_scan_change_nothing(law):
    x = jnp.asarray(np.random.default_rng(0).permutation(grid_of(law)))
    slopes = partial(derivative_of, law.estimator)

    @jax.jit
    def transformed(x):
        rows = x.reshape(4, 50)
        scanned = jax.lax.scan(lambda carry, row: (carry, slopes(row)), 0, rows)[1]
        return slopes(x), jax.vmap(slopes)(rows).ravel(), scanned.ravel(), jax.vmap(law.estimator)(rows).ravel()

    *each, codes = transformed(x)
    for got in each:
        np.testing.assert_allclose(got, slopes(x), rtol=1e-6, atol=1e-6)
    np.testing.assert_array_equal(codes, law.estimator(x))
    transformed(x + 1)
    assert transformed._cache_size() == 1


@EACH
def test_only_the_input_is_kept_and_two_temporaries_at_most(law):
    x = jnp.asarray(grid_of(law))
    kept = jax.tree.leaves(jax.vjp(law.estimator, x)[1])
    assert x.size <= sum(leaf.size for leaf in kept) < 1.1 * x.size
    both = jax.jit(lambda x, g: (law.estimator(x), jax.vjp(law.estimator, x)[1](g)))
    assert both.lower(x, x).compile().memory_analysis().temp_size_in_bytes <= 2 * x.nbytes


@EVERY
@settings(max_examples=20, deadline=None)
@given(
    x=arrays(np.float32, 16, elements=st.floats(-(2.0**14), 2.0**14, width=32, allow_subnormal=False)),
    g=st.floats(-100, 100, width=32, allow_subnormal=False),
)
def test_any_input_gets_a_code_that_rises_with_it_and_a_linear_gradient(law, x, g):
    x = np.sort(np.resize(x, 200))
    codes, slope, scaled = codes_and_gradients(law, x, g)
    assert set(np.unique(codes)) <= set(ESTIMATORS[law.name].code_set)
    assert (np.diff(codes) >= 0).all()
    assert np.isfinite(slope).all()
    np.testing.assert_allclose(scaled, g * np.asarray(slope), rtol=1e-5, atol=1e-6)


SURROGATES = {"swish_sign": swish, "heaviside": ramp}
POINTS = {"swish_sign": {"beta": 3.0}, "heaviside": {"width": 0.8, "threshold": 0.1}}


@pytest.mark.parametrize("shape", [(), (1, 3), (3,), (5, 1), (5, 3)])
@pytest.mark.parametrize(("name", "parameter"), TRAINED)
def test_trained_parameters_receive_the_derivative_of_the_surrogate(name, parameter, shape):
    x, g = np.random.default_rng(0).normal(size=(2, 5, 3)).astype(np.float32)
    centre, h = POINTS[name][parameter], 1e-6
    arguments = {{"beta": "b"}.get(key, key): value for key, value in POINTS[name].items()}
    twin = {"beta": "b"}.get(parameter, parameter)
    up, down = (
        np.vectorize(lambda v, value=value: SURROGATES[name](v, **(arguments | {twin: value})))(x.astype(np.float64))
        for value in (centre + h, centre - h)
    )
    elementwise = g * (up - down) / (2 * h)
    axes = [axis for axis, size in enumerate((1,) * (2 - len(shape)) + shape) if size == 1]
    expected = elementwise.sum(tuple(axes), keepdims=True).reshape(shape)

    def loss(value):
        return (g * ESTIMATORS[name](jnp.asarray(x), **(POINTS[name] | {parameter: value}))).sum()

    gradient = jax.jit(jax.grad(loss))(jnp.full(shape, centre))
    assert gradient.shape == shape
    np.testing.assert_allclose(gradient, expected, rtol=1e-4, atol=1e-5)


UNTRAINED = [
    (name, parameter.name)
    for name, estimator in ESTIMATORS.items()
    for parameter in inspect.signature(estimator.apply).parameters.values()
    if type(parameter.default) is float and parameter.name not in estimator.trainable
]


@pytest.mark.parametrize(("name", "parameter"), UNTRAINED)
def test_other_parameters_receive_zero(name, parameter):
    loss = lambda value: ESTIMATORS[name](jnp.linspace(-2, 2, 200), **{parameter: value}).sum()
    assert jax.grad(loss)(0.7) == 0


@pytest.mark.parametrize("beta", [1e-3, 5.0, 50.0, 1e36])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_beta_of_swish_is_safe_far_out(beta, dtype):
    x = jnp.array([-1e4, 1e4], dtype)
    dx, dbeta = jax.grad(lambda x, beta: swish_sign(x, beta=beta).sum(), argnums=(0, 1))(x, jnp.asarray(beta, dtype))
    expected = [swish_slope(v, float(jnp.asarray(beta, dtype))) for v in x.astype(jnp.float32).tolist()]
    np.testing.assert_allclose(dx.astype(jnp.float32), expected, rtol=1e-2, atol=1e-12)
    assert dbeta.dtype == dtype and abs(float(dbeta)) < 0.05


def test_printed_check_values():
    def at(name, x, **options):
        padded = jnp.asarray(np.resize(np.array(x, np.float32), 200))
        return derivative_of(partial(ESTIMATORS[name], **options), padded)[: len(x)]

    close = partial(np.testing.assert_allclose, atol=6e-6, rtol=0)
    close(at("cosh_sign", [0.0, 0.5, 1.0, 2.0]), [4, 3.14579, 1.67990, 0.28260])
    close(at("swish_sign", [0.0, 0.1, 0.5, 1.0]), [5, 4.412290, -0.084622, -0.194992])
    close(at("swish_sign", [2.39936, -2.39936], beta=1.0), [0, 0])
    close(at("swish_sign", [3.43584], beta=1.0), [-0.07383])
    close(at("fda_sign", [0.0], terms=10), [1.27324])
    close(at("fda_sign", [0.0], terms=19), [2.41916])
    close(at("long_tailed_sign", [0.2, 0.4, 1.0]), [1.2, 0.4, 0.4])
    close(at("ternary", [-0.4, 0.4]), [2.5, 2.5])
    close([swish(0.1), swish(0.5), swish(1.0), swish(2.39936, 1.0)], [0.479922, 1.198802, 1.053095, 1.19968])


@pytest.mark.parametrize("width", [0.5, 1.0, 2.0])
def test_integral_of_the_derivative_by_the_width_of_the_ramp(width):
    x = np.linspace(-3, 3, 200_001, dtype=np.float32)
    widths = jnp.full(x.shape, width)
    by_width = jax.grad(lambda widths: heaviside(jnp.asarray(x), width=widths).sum())(widths)
    assert np.trapezoid(by_width, x) == pytest.approx(-(1 - 0.3**2) / 2, abs=2e-4)


POSITIVE = [(name, p) for name, p in UNTRAINED if p not in ("eps", "rho", "delta", "threshold", "frequency")]


@pytest.mark.parametrize(("name", "parameter"), [*POSITIVE, ("swish_sign", "beta"), ("heaviside", "width")])
@pytest.mark.parametrize("value", [0, -1.0, float("nan"), np.array([1.0, 0.0]), None, "5"])
def test_scales_and_sharpness_must_be_positive(name, parameter, value):
    with pytest.raises(ValueError, match=rf"^`{parameter}` \(=.*\) must be positive; .+$"):
        ESTIMATORS[name](jnp.ones(2), **{parameter: value})


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("estimator", [sign, *ESTIMATORS.values()])
def test_integers_are_refused(estimator):
    with pytest.raises(TypeError, match=r"`x` must be a floating-point array; got int32"):
        estimator(jnp.arange(3))
    with pytest.raises(TypeError, match=r"`x` must be a floating-point array; got list; use `jnp.asarray`"):
        estimator([1.0, 2.0])
