"""Every quantizer with codes -1/+1 against a float64 twin of value and gradients, from the published formula."""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bnn_jax.quantizers.binary import binary, binary_connect, magnitude_aware, xnor
from bnn_jax.quantizers.certainty import c_sign
from bnn_jax.quantizers.codes import dequantize
from bnn_jax.quantizers.learned_scale import learned_scale, proxy, state_aware
from bnn_jax.quantizers.quantizer import Quantizer, with_estimator
from bnn_jax.quantizers.standardized import bn_free, libra_pb, rbnn

ONE = np.float32(1)
KINKS = np.array(
    [0.0, -0.0, *(s * np.nextafter(ONE, t) for s in (-1, 1) for t in (np.float32(0), ONE, np.float32(2)))], np.float32
)


def sgn(w):
    return np.where(w < 0, -1.0, 1.0)


def clipped(w):
    return (np.abs(w) <= 1).astype(np.float64)


def swish(w, beta=5.0):
    z = beta * w
    return beta * (2 - z * np.tanh(z / 2)) / (1 + np.cosh(z))


def tanh(w):
    return 1 / np.cosh(w) ** 2


def mean_magnitude(w):
    return np.abs(w).mean(0, keepdims=True)


# The twins: (w, g, parameters, state) -> value, {"w": dL/dw, name: dL/dparameter} for L = sum(g value), w of shape
# (fan-in, features), all float64.


def plain_twin(w, g, parameters, state, slope=clipped, magnitude=1.0):
    return magnitude * sgn(w), {"w": g * slope(w)}


def xnor_twin(w, g, parameters, state, *, diagonal=False, channels=None):
    def center(a):
        if channels is None:
            return a
        a = a.reshape(-1, channels, a.shape[-1])
        return (a - a.mean(1, keepdims=True)).reshape(w.shape)

    w = center(w)
    n, alpha = len(w), mean_magnitude(w)
    spread = g / n if diagonal else sgn(w) * (g * sgn(w)).sum(0, keepdims=True) / n
    return alpha * sgn(w), {"w": center(alpha * g * clipped(w) + spread)}


def magnitude_twin(w, g, parameters, state, *, scaled=False):
    alpha = mean_magnitude(w)
    return alpha * sgn(w), {"w": g * clipped(w) * (alpha if scaled else 1.0)}


def learned_scale_twin(w, g, parameters, state, slope=clipped):
    alpha = parameters["scale"]
    return alpha * sgn(w), {"w": alpha * g * slope(w), "scale": (g * sgn(w)).sum(0, keepdims=True)}


def state_aware_twin(w, g, parameters, state):
    up, down = parameters["positive_scale"], parameters["negative_scale"]
    positive = w >= 0
    gradients = {
        "w": np.where(positive, up, down) * g * clipped(w),
        "positive_scale": g[positive].sum(),
        "negative_scale": -g[~positive].sum(),
    }
    return np.where(positive, up, -down), gradients


def proxy_twin(w, g, parameters, state, *, features=False):
    d = parameters["basis"]
    value, gradients = xnor_twin(w @ d.T if features else d @ w, g, {}, {})
    h = gradients["w"]
    return value, {"w": h @ d if features else d.T @ h, "basis": h.T @ w if features else h @ w.T}


def standardize_twin(w, *, unbiased, epsilon=0.0):
    """The standardized weights and the function that takes their gradient back to w."""
    n, centered = len(w), w - w.mean(0)
    m = n - 1 if unbiased else n
    sigma = np.sqrt((centered**2).sum(0) / m)

    def pull_back(h):
        d = h / (sigma + epsilon) - centered * (h * centered).sum(0) / (m * sigma * (sigma + epsilon) ** 2)
        return d - d.mean(0)

    return centered / (sigma + epsilon), pull_back


def libra_twin(w, g, parameters, state, *, shift=True, slope=clipped):
    hat, pull_back = standardize_twin(w, unbiased=True)
    s = 2.0 ** np.round(np.log2(mean_magnitude(hat))) if shift else 1.0
    return s * sgn(hat), {"w": pull_back(s * g * slope(hat))}


def bn_free_twin(w, g, parameters, state, *, gamma=1.0, scaled=False):
    hat, pull_back = standardize_twin(w, unbiased=False, epsilon=1e-5)
    factor = gamma / np.sqrt(len(w))
    scaled_hat = parameters["gain"] * factor * hat
    value, gradients = magnitude_twin(scaled_hat, g, {}, {}, scaled=scaled)
    h = gradients["w"]
    gain = (h * factor * hat).sum(0, keepdims=True)
    return value, {"w": pull_back(h * parameters["gain"] * factor), "gain": gain}


def rbnn_twin(w, g, parameters, state, *, detach=False):
    hat, pull_back = standardize_twin(w, unbiased=True)
    left, right = state["left"], state["right"]
    a, b = len(left), len(right)
    inputs = 4 if len(w) == 36 else len(w)  # the matrices are in the order (inputs, height, width)
    there = lambda v: v.reshape(-1, inputs).T.reshape(a, b)
    turn = lambda m, x: np.stack([m(there(x[:, f])).reshape(inputs, -1).T.ravel() for f in range(x.shape[1])], 1)
    rotated = turn(lambda x: left.T @ x @ right, hat)
    angle, alpha = parameters["angle"], parameters["scale"]
    share = np.abs(np.sin(angle))
    turned = hat + share * (rotated - hat)
    h = alpha * g * np.maximum(0, np.sqrt(2) - np.abs(turned))  # RBNN's triangle at t = k = 1
    back = 0.0 if detach else turn(lambda x: left @ x @ right.T, share * h)
    gradients = {
        "w": pull_back((1 - share) * h + back),
        "scale": (g * sgn(turned)).sum(0, keepdims=True),
        "angle": np.sign(np.sin(angle)) * np.cos(angle) * ((rotated - hat) * h).sum(0, keepdims=True),
    }
    return alpha * sgn(turned), gradients


def c_sign_twin(w, g, parameters, state):
    uncertainty = np.exp(-(w**2) / (2 * w.var()))  # the threshold at progress 0.5 is 0.75
    codes = np.where(uncertainty > 0.75, state["codes"].reshape(w.shape), sgn(w))
    return mean_magnitude(w) * codes, {"w": g * clipped(w)}


class Entry(NamedTuple):
    quantizer: Quantizer
    twin: Callable
    exact: bool = True
    """The sign is that of w itself, so that kinks can be placed."""


ENTRIES = {
    "binary": Entry(with_estimator(binary), plain_twin),
    "binary, identity": Entry(with_estimator(binary, "identity_sign"), partial(plain_twin, slope=np.ones_like)),
    "binary_connect": Entry(binary_connect(magnitude=0.5), partial(plain_twin, slope=np.ones_like, magnitude=0.5)),
    "xnor": Entry(with_estimator(xnor), xnor_twin),
    "xnor, diagonal": Entry(with_estimator(xnor, gradient="diagonal"), partial(xnor_twin, diagonal=True)),
    "xnor, centered": Entry(with_estimator(xnor, center=True), partial(xnor_twin, channels=4), exact=False),
    "xnor, centered, diagonal": Entry(
        with_estimator(xnor, center=True, gradient="diagonal"),
        partial(xnor_twin, channels=4, diagonal=True),
        exact=False,
    ),
    "magnitude_aware": Entry(with_estimator(magnitude_aware), magnitude_twin),
    "magnitude_aware, scaled": Entry(
        with_estimator(magnitude_aware, scaled_gradient=True), partial(magnitude_twin, scaled=True)
    ),
    "learned_scale": Entry(learned_scale(), learned_scale_twin),
    "learned_scale, BNN+": Entry(
        learned_scale("swish_sign", initial="median"), partial(learned_scale_twin, slope=swish)
    ),
    "state_aware": Entry(state_aware(), state_aware_twin),
    "proxy": Entry(proxy(), proxy_twin, exact=False),
    "proxy, features": Entry(proxy(mixing="features"), partial(proxy_twin, features=True), exact=False),
    "libra_pb": Entry(with_estimator(libra_pb), libra_twin, exact=False),
    "libra_pb, tanh": Entry(
        with_estimator(libra_pb, "tanh_sign", shift=False), partial(libra_twin, shift=False, slope=tanh), exact=False
    ),
    "bn_free": Entry(bn_free(gamma=2.0), partial(bn_free_twin, gamma=2.0), exact=False),
    "bn_free, scaled": Entry(bn_free(scaled_gradient=True), partial(bn_free_twin, scaled=True), exact=False),
    "rbnn": Entry(rbnn(t=1.0, k=1.0), rbnn_twin, exact=False),
    "rbnn, detached": Entry(rbnn(t=1.0, k=1.0, detach_rotation=True), partial(rbnn_twin, detach=True), exact=False),
    "c_sign": Entry(c_sign(), c_sign_twin),
}
SHAPE = (3, 3, 4, 5)


def weights(seed, shape=SHAPE, *, kinks=False):
    w = np.random.default_rng(seed).normal(size=shape).astype(np.float32)
    if kinks:
        w.reshape(-1)[: len(KINKS)] = KINKS
    return jnp.asarray(w)


def learned(quantizer, w, seed=0):
    """Parameters away from their initial values, and the state."""
    parameters = quantizer.init(jax.random.key(0), w) if quantizer.init else {}
    rng = np.random.default_rng(seed)
    moved = lambda p: p * jnp.asarray(rng.uniform(0.3, 0.9, p.shape), p.dtype) + (0.1 if p.ndim == 2 else 0.0)
    state = quantizer.init_state(jax.random.key(1), w) if quantizer.init_state else None
    if state is not None and "codes" in state:
        state = {**state, "codes": jnp.asarray(rng.choice([-1.0, 1.0], w.shape), w.dtype)}
    return {name: moved(p) for name, p in parameters.items()}, state


def apply(quantizer, w, parameters, state=None, *, train=False, progress=0.5, key=None):
    wanted = {"train": train, "progress": progress, "key": key}
    given = {name: value for name, value in wanted.items() if name in quantizer.wants} | parameters
    return quantizer.apply(w, **given) if state is None else quantizer.apply(w, state, **given)


def value_of(quantizer, w, parameters, state=None, **phase):
    result = apply(quantizer, w, parameters, state, **phase)
    return dequantize(result if state is None else result[0])


def value_and_gradients(quantizer, w, g, parameters, state, **phase):
    def loss(w, parameters):
        value = value_of(quantizer, w, parameters, state, **phase)
        return (value * g).sum(), value

    (dw, dparameters), value = jax.grad(loss, argnums=(0, 1), has_aux=True)(w, parameters)
    return value, {"w": dw, **dparameters}


def assert_equals_twin(name, w, seed):
    quantizer, twin, *_ = ENTRIES[name]
    g = jnp.asarray(np.random.default_rng(seed + 100).normal(size=w.shape), jnp.float32)
    parameters, state = learned(quantizer, w, seed)
    # c_sign is told its progress in training alone; RBNN adapts its rotations then, which other tests follow.
    run = jax.jit(partial(value_and_gradients, quantizer, train=name == "c_sign"))
    value, gradients = run(w, g, parameters, state)
    as_matrix = lambda a: np.asarray(a, np.float64).reshape(-1, w.shape[-1])
    wide = {n: np.asarray(p, np.float64).reshape(-1, w.shape[-1]) if p.ndim > 2 else np.asarray(p, np.float64)
            for n, p in parameters.items()}  # fmt: skip
    expected_state = {} if state is None else {n: np.asarray(s, np.float64) for n, s in state.items()}
    expected, expected_gradients = twin(as_matrix(w), as_matrix(g), wide, expected_state)
    np.testing.assert_allclose(as_matrix(value), expected, rtol=2e-6)
    assert set(gradients) == set(expected_gradients)
    for parameter, gradient in gradients.items():
        reference = np.asarray(expected_gradients[parameter])
        np.testing.assert_allclose(
            np.asarray(gradient).reshape(reference.shape), reference, rtol=2e-4, atol=2e-5, err_msg=parameter
        )


@pytest.mark.parametrize("name", ENTRIES)
def test_value_and_gradient_equal_the_twin(name):
    assert_equals_twin(name, weights(0, kinks=ENTRIES[name].exact), 0)


@pytest.mark.parametrize("name", ENTRIES)
def test_value_and_gradient_of_a_dense_kernel_equal_the_twin(name):
    # Centring takes all inputs of a dense kernel for its channels: the twin of the table has four.
    fan_in = 4 if "centered" in name else 12
    assert_equals_twin(name, weights(1, (fan_in, 5), kinks=ENTRIES[name].exact), 1)


@pytest.mark.parametrize(
    "quantizer", [c_sign(), rbnn(), with_estimator(libra_pb, "ede_sign")], ids=["c_sign", "rbnn", "libra_pb"]
)
def test_progress_does_not_recompile(quantizer):
    w = weights(6)
    parameters, state = learned(quantizer, w)

    @jax.jit
    def run(w, state, progress):
        return value_and_gradients(quantizer, w, jnp.ones_like(w), parameters, state, train=True, progress=progress)

    first, last = (run(w, state, jnp.float32(progress)) for progress in (0.0, 1.0))
    assert any((a != b).any() for a, b in zip(jax.tree.leaves(first), jax.tree.leaves(last)))
    assert run._cache_size() == 1


@pytest.mark.parametrize(
    ("factory", "option"),
    [
        (learned_scale, "initial"),
        (proxy, "mixing"),
        (bn_free, "epsilon"),
        (rbnn, "period_steps"),
        (c_sign, "start"),
    ],
)
def test_a_misspelt_option_is_named_with_the_nearest(factory, option):
    with pytest.raises(ValueError, match=rf"`option` \(='{option}x'\) is not known; did you mean '{option}'\?"):
        factory(**{option + "x": 1})


@pytest.mark.parametrize("factory", [learned_scale, state_aware, proxy, bn_free, rbnn, c_sign])
def test_options_of_the_estimator_are_learned_with_the_rest(factory):
    quantizer = factory("swish_sign", beta=2.0, trainable=True)
    w = 0.1 * weights(7)
    parameters, state = learned(quantizer, w)
    assert quantizer.init(jax.random.key(0), w)["beta"] == 2.0
    run = jax.jit(partial(value_and_gradients, quantizer, train=False))
    slope = lambda beta: run(w, w, parameters | {"beta": jnp.float32(beta)}, state)[1]
    assert np.abs(slope(2.0)["w"] - slope(5.0)["w"]).max() > 1e-3
    assert slope(2.0)["beta"] != 0
