"""Laws of every quantizer of the tables, and of options that change its arithmetic: what comes out, and how it runs."""

from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bnn_jax.estimators import ESTIMATORS
from bnn_jax.quantizers import ACTIVATION_QUANTIZERS, WEIGHT_QUANTIZERS, bases, dequantize, make_quantizer, validate

OPTIONS = [
    (WEIGHT_QUANTIZERS, "abc_net", {"bases": 1}),
    (WEIGHT_QUANTIZERS, "abc_net", {"bases": 4, "per_channel": True}),
    (WEIGHT_QUANTIZERS, "binary", {"estimator": "identity_sign"}),
    (WEIGHT_QUANTIZERS, "binary_connect", {"magnitude": 0.5}),
    (WEIGHT_QUANTIZERS, "binary_connect", {"stochastic": True}),
    (WEIGHT_QUANTIZERS, "bn_free", {"scaled_gradient": True}),
    (WEIGHT_QUANTIZERS, "dorefa", {"bits": 1}),
    (WEIGHT_QUANTIZERS, "dorefa", {"bits": 4, "max_gradient": True}),
    (WEIGHT_QUANTIZERS, "inq", {"bits": 4}),
    (WEIGHT_QUANTIZERS, "libra_pb", {"estimator": "tanh_sign", "shift": False}),
    (WEIGHT_QUANTIZERS, "lq_net", {"bits": 3}),
    (WEIGHT_QUANTIZERS, "magnitude_aware", {"scaled_gradient": True}),
    (WEIGHT_QUANTIZERS, "proxy", {"mixing": "features"}),
    (WEIGHT_QUANTIZERS, "rbnn", {"detach_rotation": True}),
    (WEIGHT_QUANTIZERS, "biper", {"stage": 1}),
    (WEIGHT_QUANTIZERS, "progressive", {"straight_through": True}),
    (WEIGHT_QUANTIZERS, "dsq", {"bits": 1}),
    (WEIGHT_QUANTIZERS, "twn", {"per_channel": True, "clip_value": 1.0}),
    (WEIGHT_QUANTIZERS, "wrpn", {"bits": 1}),
    (WEIGHT_QUANTIZERS, "xnor", {"center": True, "gradient": "diagonal"}),
    (WEIGHT_QUANTIZERS, "xnor", {"center": True, "as_released": True}),
    (ACTIVATION_QUANTIZERS, "abc_net", {"bases": 1}),
    (ACTIVATION_QUANTIZERS, "recu", {"constant_deviation": True}),
    (ACTIVATION_QUANTIZERS, "lq_net", {"bits": 3}),
    (ACTIVATION_QUANTIZERS, "residual", {"per_example": False}),
    (ACTIVATION_QUANTIZERS, "rsign", {"estimator": "ste_sign", "clip_value": 1.25}),
]
TABLES = (WEIGHT_QUANTIZERS, ACTIVATION_QUANTIZERS)
CASES = [(table, name, {}) for table in TABLES for name in table if name != "full_precision"] + OPTIONS


LATER = ("recu", "ovsw", "biper", "fda", "progressive", "lsq", "dsq")
"""Of which make test knows the formulas alone, by tests/quantizers/test_after_2020.py."""


def over(cases):
    """Parametrize a test; "w" is for weights, "a" for activations."""
    ids = ["-".join([("w", "a")[t is ACTIVATION_QUANTIZERS], n, *map(str, o.values())]) for t, n, o in cases]
    marks = [pytest.mark.full if name in LATER else () for _, name, _ in cases]
    params = [pytest.param(*case, id=name, marks=own) for case, name, own in zip(cases, ids, marks, strict=True)]
    return pytest.mark.parametrize(("table", "name", "options"), params)


REAL_IN_TRAINING = ("post_training", "inq", "fda", "biper", "progressive")
SHAPE = (3, 3, 4, 6)
KEY = jax.random.key(0)


def drawn(seed):
    return np.random.default_rng(seed).normal(size=SHAPE).astype(np.float32)


def started(quantizer, x):
    """Parameters away from where they start, and the state."""
    parameters = quantizer.init(KEY, x) if quantizer.init else {}
    moved = {name: p * (1 + jnp.arange(p.size, dtype=p.dtype).reshape(p.shape) / 8) for name, p in parameters.items()}
    return moved, quantizer.init_state(KEY, x) if quantizer.init_state else {}


def applied(quantizer, x, parameters, state, *, train, progress=0.5, key=KEY):
    """What a layer sees: the quantized tensor and the state after the call, {} where there is none."""
    wanted = {"train": train, "progress": progress, "key": key if train else None}
    given = {name: wanted[name] for name in quantizer.wants} | parameters
    return quantizer.apply(x, state, **given) if state else (quantizer.apply(x, **given), {})


def with_gradients(quantizer, x, parameters, state, g, **phase):
    """((gradient by x, gradients by the parameters), (quantized tensor, state after the call)), in training."""

    def loss(x, parameters):
        quantized, after = applied(quantizer, x, parameters, state, train=True, **phase)
        return (dequantize(quantized) * g).sum(), (quantized, after)

    return jax.grad(loss, argnums=(0, 1), has_aux=True)(x, parameters)


def check_codes(quantized, code_set):
    """Every base has codes of its own set."""
    sets = code_set if isinstance(code_set[0], tuple) else [code_set] * len(bases(quantized))
    for base, values in zip(bases(quantized), sets, strict=True):
        validate(base, values)


@over(CASES)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_codes_dtypes_states_and_finite_extremes(table, name, options, dtype):
    """In training and evaluation; new inputs, another progress and another key do not recompile."""
    quantizer, w, g = make_quantizer(table, name, **options), drawn(0), jnp.asarray(drawn(1), dtype)
    parameters, state = started(quantizer, jnp.asarray(w, dtype))

    @jax.jit
    def run(x, progress, key):
        trained = with_gradients(quantizer, x, parameters, state, g, progress=progress, key=key)
        return trained, applied(quantizer, x, parameters, state, train=False)

    spread = 1e4 * np.sign(w) * np.linspace(0.5, 1, w.size, dtype=np.float32).reshape(SHAPE)
    for seed, x in enumerate((w, np.zeros_like(w), np.full_like(w, 0.3), 1e4 * w, 1e4 * np.sign(w), spread)):
        trained, evaluated = run(jnp.asarray(x, dtype), seed / 5, jax.random.key(seed))
        (gradients, (quantized, after)), (evaluation, kept) = trained, evaluated
        chex.assert_tree_all_finite((trained, evaluated))
        for base in (*bases(quantized), *bases(evaluation)):
            assert base.codes.shape == SHAPE
            assert base.codes.dtype == base.scale.dtype == dtype
        assert gradients[0].dtype == dtype
        assert jax.tree.map(jnp.result_type, gradients[1]) == jax.tree.map(jnp.result_type, parameters)
        if quantizer.code_set:
            check_codes(evaluation, quantizer.code_set)
        if name not in REAL_IN_TRAINING:
            check_codes(quantized, quantizer.code_set or (-1, 1))
        kinds = partial(jax.tree.map, lambda a: (a.shape, a.dtype))
        assert kinds(after) == kinds(state)
        chex.assert_trees_all_equal(kept, state)
    assert run._cache_size() == 1


# How an estimator runs is tested with the estimators: one with a schedule and one with a key stand for all here.
@over([case for case in CASES if case[1] not in ESTIMATORS or case[1] in ("ede_sign", "gumbel_sign")])
def test_jit_vmap_and_scan_equal_plain_calls(table, name, options):
    """Codes, scales, gradients and states of two training steps."""
    quantizer, g = make_quantizer(table, name, **options), jnp.asarray(drawn(4))
    first, second = jnp.asarray(drawn(2)), 1 - 2 * jnp.asarray(drawn(3))
    parameters, start = started(quantizer, first)

    def step(state, x):
        gradients, (quantized, state) = with_gradients(quantizer, x, parameters, state, g)
        return state, (quantized, gradients)

    rounding = 1e-5 if name in REAL_IN_TRAINING else 0

    def same(found, expected):
        state, (quantized, gradients) = found
        expected_state, (expected_quantized, expected_gradients) = expected
        for base, other in zip(bases(quantized), bases(expected_quantized), strict=True):
            np.testing.assert_allclose(base.codes, other.codes, rtol=rounding, atol=rounding)
            np.testing.assert_allclose(base.scale, other.scale, rtol=1e-5)
        found, expected = (state, gradients), (expected_state, expected_gradients)
        chex.assert_trees_all_close(found, expected, rtol=1e-5, atol=max(1e-6, rounding))

    jitted = jax.jit(step)
    one, other = jitted(start, first), jitted(start, second)
    plain, after = applied(quantizer, first, parameters, start, train=True)
    same((after, (plain, one[1][1])), one)
    together, (last, scanned) = jax.jit(
        lambda both: (jax.vmap(step, (None, 0))(start, both), jax.lax.scan(step, start, both))
    )(jnp.stack([first, second]))
    at = lambda tree, i: jax.tree.map(lambda a: a[i], tree)
    same(at(together, 0), one)
    same(at(together, 1), other)
    same((one[0], at(scanned, 0)), one)
    same((last, at(scanned, 1)), jitted(one[0], second))
    assert jitted._cache_size() == 1


@pytest.mark.usefixtures("unchecked")
@over(CASES)
def test_integers_are_refused(table, name, options):
    quantizer, x = make_quantizer(table, name, **options), jnp.ones(SHAPE, jnp.int32)
    parameters, state = started(quantizer, jnp.ones(SHAPE))
    with pytest.raises(TypeError, match=r"^`[wx]` must be a floating-point array; got int32; convert it with"):
        applied(quantizer, x, parameters, state, train=False)
