"""Methods after 2020 against float64 transcriptions of their formulas, differentiated numerically.

A transcription has in sign's place a function of the same value whose derivative is the one that the method chooses,
and holds constant what the method holds constant.
"""

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bnn_jax.quantizers import ACTIVATION_QUANTIZERS, WEIGHT_QUANTIZERS, dequantize, make_quantizer

SHAPE = (3, 3, 4, 5)
FAN_IN, VALUES = (0, 1, 2), (1, 2, 3)
"""The axes of a filter, and those of an example."""


class First:
    """Remember the first values that pass, in the order of the calls."""

    def __init__(self):
        self.values, self.calls = [], 0

    def __call__(self, value):
        self.calls += 1
        if self.calls > len(self.values):
            self.values.append(np.array(value))
        return self.values[self.calls - 1]


class Transcription:
    """A formula with the derivatives that a method chooses: `held` values do not change, `sign` has a slope."""

    def __init__(self, formula: Callable[..., np.ndarray]):
        self.formula, self.held = formula, First()

    def sign(self, z, surrogate=lambda z: z):
        first = self.held(z)
        return np.where(first < 0, -1.0, 1.0) + surrogate(z) - surrogate(first)

    def __call__(self, arrays: dict[str, np.ndarray]) -> np.ndarray:
        self.held.calls = 0
        return self.formula(self, **arrays)

    def gradients(self, arrays: dict[str, np.ndarray], g: np.ndarray, h: float = 1e-6) -> dict[str, np.ndarray]:
        """Of (g value).sum() by every array, by central differences."""
        self(arrays)
        found = {}
        for name, array in arrays.items():
            found[name] = np.zeros(array.shape)
            for index in np.ndindex(array.shape):
                ends = []
                for step in (h, -h):
                    moved = array.copy()
                    moved[index] += step
                    ends.append((g * self(arrays | {name: moved})).sum())
                found[name][index] = (ends[0] - ends[1]) / (2 * h)
        return found


def approx(z):
    """What approx_sign is the derivative of."""
    a = np.minimum(np.abs(z), 1)
    return np.copysign(2 * a - a * a, z)


def variance(x, axes):
    return x.var(axes, ddof=1, keepdims=True)


def standardized(w):
    return (w - w.mean(FAN_IN)) / np.sqrt(variance(w, FAN_IN) + 1e-5)


def recu_twin(t, x, scale, progress=0.5, tau_min=0.85, tau_max=0.99):
    hat = 2 * np.sqrt(2) * standardized(x)
    tau = tau_min + (tau_max - tau_min) * (np.e**progress - 1) / (np.e - 1)
    q = t.held(-np.abs(hat).mean() * np.log(2 - 2 * tau))
    return scale * t.sign(np.maximum(np.minimum(hat, q), -q))


def scaled_inputs_twin(t, x):
    return t.sign(x / np.sqrt(variance(x, VALUES) + 1e-5), approx)


def ovsw_inputs_twin(t, x):
    return t.sign(x / t.held(np.sqrt(variance(x, VALUES) + 1e-5)), approx)


def ovsw_twin(t, x):
    return t.held(np.abs(standardized(x)).mean(FAN_IN)) * t.sign(x)


def adabin_twin(t, x):
    beta = x.mean(FAN_IN)
    alpha = np.sqrt(((x - beta) ** 2).sum(FAN_IN) / 36)
    return alpha * t.sign((x - beta) / alpha, np.tanh) + beta  # EDE in the middle of training: t = k = 1


def adabin_inputs_twin(t, x, half_width, middle):
    return half_width * t.sign((x - middle) / half_width, approx) + middle


def biper_twin(t, x, scale, stage=2):
    wave = np.sin(2 * x)
    return scale * (wave if stage == 1 else t.sign(wave))


def noise(rows, squeeze, expand):
    return 0.05 * (np.maximum(rows @ squeeze, 0) @ expand + 0.1 * np.sin(rows))  # in the middle of training


def fourier(z, terms=14, w=0.1):  # from 10 to 19 in training, whole, ties to even
    z = np.clip(z, -1, 1)
    return 4 / np.pi * sum(np.sin((2 * i + 1) * w * z) / (2 * i + 1) for i in range(terms))


def fda_twin(t, x, squeeze, expand):
    eta = noise(x.reshape(36, 5).T, squeeze, expand).T.reshape(SHAPE)
    return t.held(np.abs(x).mean(FAN_IN)) * (t.sign(x, fourier) + eta)


def fda_inputs_twin(t, x, squeeze, expand):
    return t.sign(x, fourier) + noise(x.reshape(-1, 5), squeeze, expand).reshape(SHAPE)


def progressive_twin(t, x, straight_through=False):
    frozen = np.asarray(jax.random.uniform(jax.random.key(0), SHAPE) < 0.5)
    clipped = np.clip(x, -1, 1)
    signs = t.sign(x, lambda z: np.clip(z, -1, 1) if straight_through else 0 * z)
    return np.where(frozen, signs, clipped)


def lsq_twin(t, x, step, lowest=-2, highest=1, count=180):
    s, ratio = t.held(step), t.held(x / step)
    inside = (ratio > lowest) & (ratio < highest)
    codes = np.round(np.clip(ratio, lowest, highest))
    by_step = np.where(inside, codes - ratio, codes) / np.sqrt(count * highest)
    return s * codes + np.where(inside, x - t.held(x), 0) + by_step * (step - s)


def dsq_twin(t, x, lower, upper, sharpness, bits=2):
    n = 2**bits - 1
    delta = (upper - lower) / n
    i = t.held(np.clip(np.floor((x - lower) / delta), 0, n - 1))
    m = lower + (i + 0.5) * delta
    phi = np.tanh(np.log(2 / sharpness - 1) / delta * (x - m)) / (1 - sharpness)
    between = lower + delta * (i + (t.sign(phi) + 1) / 2)
    return np.where(x < lower, lower, np.where(x > upper, upper, between))


class Case(NamedTuple):
    table: Any
    name: str
    twin: Callable[..., np.ndarray]
    options: Mapping[str, Any] = {}

    def __repr__(self):
        return "-".join(["wa"[self.table is ACTIVATION_QUANTIZERS], self.name, *map(str, self.options.values())])


CASES = [
    Case(WEIGHT_QUANTIZERS, "recu", recu_twin),
    Case(ACTIVATION_QUANTIZERS, "recu", scaled_inputs_twin),
    Case(WEIGHT_QUANTIZERS, "ovsw", ovsw_twin),
    Case(ACTIVATION_QUANTIZERS, "recu", ovsw_inputs_twin, {"constant_deviation": True}),
    Case(WEIGHT_QUANTIZERS, "adabin", adabin_twin),
    Case(ACTIVATION_QUANTIZERS, "adabin", adabin_inputs_twin),
    Case(WEIGHT_QUANTIZERS, "biper", biper_twin, {"frequency": 2.0}),
    Case(WEIGHT_QUANTIZERS, "biper", partial(biper_twin, stage=1), {"frequency": 2.0, "stage": 1}),
    Case(WEIGHT_QUANTIZERS, "fda", fda_twin),
    Case(ACTIVATION_QUANTIZERS, "progressive", progressive_twin),
    Case(
        WEIGHT_QUANTIZERS, "progressive", partial(progressive_twin, straight_through=True), {"straight_through": True}
    ),
    Case(ACTIVATION_QUANTIZERS, "fda", fda_inputs_twin),
    Case(WEIGHT_QUANTIZERS, "lsq", lsq_twin),
    Case(ACTIVATION_QUANTIZERS, "lsq", partial(lsq_twin, lowest=0, highest=3, count=60)),
    Case(WEIGHT_QUANTIZERS, "dsq", dsq_twin),
    Case(WEIGHT_QUANTIZERS, "dsq", partial(dsq_twin, bits=1), {"bits": 1}),
    Case(ACTIVATION_QUANTIZERS, "dsq", dsq_twin),
]


@partial(jax.jit, static_argnums=0)
def trained(quantizer, x, parameters, g):
    """Value and gradients, of x and of the parameters, in the middle of training."""
    wanted = {"train": True, "progress": 0.5, "key": jax.random.key(0)}
    wanted = {name: wanted[name] for name in quantizer.wants}

    def loss(x, parameters):
        value = dequantize(quantizer.apply(x, **parameters, **wanted))
        return (value * g).sum(), value

    (_, value), (dx, gradients) = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(x, parameters)
    return value, {"x": dx} | gradients


def near(found, expected):
    """To 1e-6 of the largest, of 1, or, of a sum over many elements, of the root of their number."""
    error = np.abs(np.asarray(found, np.float64).reshape(expected.shape) - expected).max()
    terms = math.prod(SHAPE) / expected.size
    assert error <= 1e-6 * max(terms**0.5, np.abs(expected).max()), error


@pytest.mark.parametrize("case", CASES, ids=repr)
def test_value_and_gradients_equal_the_formulas(case):
    rng = np.random.default_rng(0)
    x, g = (rng.normal(size=SHAPE).astype(np.float32) for _ in range(2))
    quantizer = make_quantizer(case.table, case.name, **case.options)
    parameters = quantizer.init(jax.random.key(0), jnp.asarray(x)) if quantizer.init else {}
    # Away from where they start, zeros and ones.
    parameters = {name: np.float32(0.9) * p + np.float32(0.1) for name, p in parameters.items()}
    value, gradients = trained(quantizer, jnp.asarray(x), parameters, jnp.asarray(g))
    exact = {name: np.asarray(array, np.float64) for name, array in ({"x": x} | parameters).items()}
    twin = Transcription(case.twin)
    near(value, twin(exact))
    for name, expected in twin.gradients(exact, g.astype(np.float64)).items():
        near(gradients[name], expected)
