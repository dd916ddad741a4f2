"""Every entry of the tables in a layer: codes, states, gradients; and the catalogue of methods they must hold."""

import inspect
from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bnn_jax import regularizers
from bnn_jax.estimators import ESTIMATORS, Estimator, ede_sign, make_sign, swish_sign
from bnn_jax.layers import BinaryConv, OutputScale
from bnn_jax.optim import OPTIMIZERS, make_optimizer, scale_latent_updates
from bnn_jax.quantizers import (
    ACTIVATION_QUANTIZERS,
    GRADIENT_QUANTIZERS,
    WEIGHT_QUANTIZERS,
    Quantized,
    bases,
    binary,
    decouple,
    dequantize,
    full_latent,
    make_quantizer,
    stateless,
    with_estimator,
)
from bnn_jax.quantizers.learned_scale import learned_scale

SIGN, TERNARY, TWO_BITS = (-1, 1), (-1, 0, 1), (0, 1, 2, 3)
ONE_SIDED = ((0, 1), (-1, 0))
ADAPTIVE = ((-1, 1), (1,))
WEIGHT_CODES = {
    "binary": SIGN,
    "binary_connect": SIGN,
    "post_training": SIGN,
    "xnor": SIGN,
    "magnitude_aware": SIGN,
    "learned_scale": SIGN,
    "bnn_plus": SIGN,
    "state_aware": ONE_SIDED,
    "proxy": SIGN,
    "c_sign": SIGN,
    "libra_pb": SIGN,
    "dir_net": SIGN,
    "rbnn": SIGN,
    "bn_free": SIGN,
    "recu": SIGN,
    "adabin": ADAPTIVE,
    "biper": SIGN,
    "progressive": SIGN,
    "fda": SIGN,
    "ovsw": SIGN,
    "abc_net": SIGN,
    "ttq": ONE_SIDED,
    "twn": TERNARY,
    "dorefa": (-3, -1, 1, 3),
    "wrpn": TERNARY,
    "lq_net": SIGN,
    "lsq": (-2, -1, 0, 1),
    "dsq": ((-3, -1, 1, 3), (1,)),
    "inq": tuple(sorted({0, *(sign * 2**n for sign in (-1, 1) for n in range(8))})),
    "bitnet": SIGN,
    "bitnet_b158": TERNARY,
}
ACTIVATION_CODES = {
    **{name: SIGN for name, estimator in ESTIMATORS.items() if estimator.code_set == SIGN},
    "rbnn": SIGN,
    "recu": SIGN,
    "adabin": ADAPTIVE,
    "fda": SIGN,
    "progressive": SIGN,
    "rsign": SIGN,
    "unbalanced": SIGN,
    "sparse": (0, 1),
    "coupled": (0, 1, 2),
    "decoupled": (0, 1),
    "tbn": TERNARY,
    "tbn_v2": TERNARY,
    "abc_net": SIGN,
    "residual": SIGN,
    "dorefa": TWO_BITS,
    "wrpn": TWO_BITS,
    "pact": TWO_BITS,
    "hwgq": TWO_BITS,
    "lq_net": (0, 1),
    "lsq": TWO_BITS,
    "dsq": ((-3, -1, 1, 3), (1,)),
    "bitnet": tuple(range(-127, 128)),
    "elastic": SIGN,
}
ENTRIES = [(WEIGHT_QUANTIZERS, name) for name in WEIGHT_CODES] + [(ACTIVATION_QUANTIZERS, n) for n in ACTIVATION_CODES]
IDS = [f"{'weight' if table is WEIGHT_QUANTIZERS else 'activation'}-{name}" for table, name in ENTRIES]


def test_every_entry_has_its_code_set():
    assert set(WEIGHT_CODES) | {"full_precision"} == set(WEIGHT_QUANTIZERS)
    assert set(ACTIVATION_CODES) | {"full_precision"} == set(ACTIVATION_QUANTIZERS)
    assert WEIGHT_QUANTIZERS["full_precision"]() is ACTIVATION_QUANTIZERS["full_precision"]() is None


def evaluated(quantizer, x):
    """What evaluation sees of a fresh quantizer."""
    key = jax.random.key(0)
    given = dict(quantizer.init(key, x)) if quantizer.init else {}
    given |= {
        name: value for name, value in (("train", False), ("progress", 1.0), ("key", None)) if name in quantizer.wants
    }
    if quantizer.init_state is None:
        return quantizer.apply(x, **given)
    return quantizer.apply(x, quantizer.init_state(key, x), **given)[0]


@pytest.mark.parametrize(("table", "name"), ENTRIES, ids=IDS)
def test_code_sets_by_default(table, name):
    assert (
        make_quantizer(table, name).code_set == (WEIGHT_CODES if table is WEIGHT_QUANTIZERS else ACTIVATION_CODES)[name]
    )


@pytest.mark.parametrize(
    ("table", "name", "options", "lowest", "highest", "count"),
    [
        *((WEIGHT_QUANTIZERS, "dorefa", {"bits": k}, 1 - 2**k, 2**k - 1, 2**k) for k in (1, 2, 3, 5)),
        (WEIGHT_QUANTIZERS, "wrpn", {"bits": 1}, -1, 1, 2),
        *((WEIGHT_QUANTIZERS, "wrpn", {"bits": k}, 1 - 2 ** (k - 1), 2 ** (k - 1) - 1, 2**k - 1) for k in (2, 3, 5)),
        *((WEIGHT_QUANTIZERS, "inq", {"bits": k}, -(2**low), 2**low, 2 * low + 3) for k, low in ((3, 1), (4, 3))),
        *((ACTIVATION_QUANTIZERS, n, {"bits": k}, 0, 2**k - 1, 2**k) for n in ("dorefa", "pact") for k in (1, 3, 5)),
        *((ACTIVATION_QUANTIZERS, n, {"bits": k}, 0, 2**k - 1, 2**k) for n in ("wrpn", "hwgq") for k in (1, 2, 4)),
        (ACTIVATION_QUANTIZERS, "dorefa", {"bits": 12}, 0, 4095, 4096),
        (WEIGHT_QUANTIZERS, "lq_net", {"bits": 3}, -1, 1, 2),
        (WEIGHT_QUANTIZERS, "abc_net", {"bases": 4}, -1, 1, 2),
        (ACTIVATION_QUANTIZERS, "residual", {"bases": 3, "estimator": "tanh_sign"}, -1, 1, 2),
    ],
)
def test_the_declared_codes_follow_the_options_and_all_occur(table, name, options, lowest, highest, count):
    quantizer = make_quantizer(table, name, **options)
    assert len(quantizer.code_set) == count
    x = jnp.asarray(np.random.default_rng(0).permutation(np.linspace(-3, 11, 60000)).reshape(100, 600), jnp.float32)
    x = jnp.abs(x) * jnp.where(jnp.arange(600) % 2 == 0, 1, -1)[None] if table is WEIGHT_QUANTIZERS else x
    for base in bases(evaluated(quantizer, x)):
        found = np.unique(base.codes)
        assert (found[0], found[-1]) == (lowest, highest)
        np.testing.assert_array_equal(found, quantizer.code_set)


def test_codes_of_ones_own_quantizer():
    three_valued = lambda x: jnp.where(x > 0, 2.0, jnp.where(x < 0, -1.0, 0.0))
    assert with_estimator(binary, three_valued, code_set=(-1, 0, 2)).code_set == (-1, 0, 2)
    assert with_estimator(binary, lambda x: jnp.sign(x) + (x == 0)).code_set == (-1, 1)
    assert with_estimator(binary, "heaviside").code_set == (0, 1)
    assert stateless(lambda x: x, code_set=(0, 5)).code_set == (0, 5)


def test_evaluation_with_real_weights_declares_no_codes():
    quantizer = make_quantizer(WEIGHT_QUANTIZERS, "binary_connect", stochastic=True)
    assert quantizer.code_set == ()
    w = jnp.array([[0.3], [-0.2]])
    np.testing.assert_array_equal(dequantize(evaluated(quantizer, w)), w)


@pytest.mark.parametrize(("table", "name"), ENTRIES, ids=IDS)
def test_three_training_steps_in_a_layer(table, name):
    """Parameters and states of every method travel through a jitted layer; a changing progress does not recompile."""
    place = "kernel_quantizer" if table is WEIGHT_QUANTIZERS else "input_quantizer"
    quantizers = {"kernel_quantizer": make_quantizer(WEIGHT_QUANTIZERS, "xnor")} | {place: make_quantizer(table, name)}
    layer = BinaryConv(6, kernel_size=(3, 3), **quantizers)
    rng = np.random.default_rng(1)
    x, target = (jnp.asarray(rng.normal(size=(2, 5, 5, n)), jnp.float32) for n in (4, 6))
    state = dict(jax.jit(layer.init)(jax.random.key(0), x))
    params = state.pop("params")

    @jax.jit
    def step(params, state, progress, key):
        def loss(params):
            y, updated = layer.apply(
                {"params": params} | state,
                x,
                train=True,
                progress=progress,
                mutable=list(state),
                rngs={"quantizer": key},
            )
            return ((y - target) ** 2).mean(), updated

        gradient, state_after = jax.grad(loss, has_aux=True)(params)
        return jax.tree.map(lambda p, g: p - 0.1 * g, params, gradient), dict(state_after), gradient

    for number in range(3):
        params, state, gradient = step(params, state, number / 3, jax.random.key(number))
        chex.assert_tree_all_finite((params, gradient))
        assert any(jnp.any(leaf != 0) for leaf in jax.tree.leaves(gradient))
    assert step._cache_size() == 1
    assert jnp.isfinite(jax.jit(layer.apply)({"params": params} | state, x)).all()


@pytest.mark.parametrize("table", [WEIGHT_QUANTIZERS, ACTIVATION_QUANTIZERS])
def test_an_unknown_quantizer_is_named_with_the_nearest(table):
    with pytest.raises(ValueError, match=r"`quantizer` \(='dorefaa'\) is not known; did you mean 'dorefa'\?"):
        make_quantizer(table, "dorefaa")


@pytest.mark.parametrize(
    ("table", "name", "option", "nearest"),
    [
        (WEIGHT_QUANTIZERS, "xnor", "centre", "center"),
        (WEIGHT_QUANTIZERS, "dorefa", "bit", "bits"),
        (WEIGHT_QUANTIZERS, "ttq", "thresold", "threshold"),
        (ACTIVATION_QUANTIZERS, "ste_sign", "clip", "clip_value"),
        (ACTIVATION_QUANTIZERS, "ede_sign", "tmin", "t_min"),
        (ACTIVATION_QUANTIZERS, "hwgq", "nbits", "bits"),
    ],
)
def test_an_unknown_option_is_named_with_the_nearest(table, name, option, nearest):
    with pytest.raises(ValueError, match=rf"`option` \(='{option}'\) is not known; did you mean '{nearest}'\?"):
        make_quantizer(table, name, **{option: 1})


def test_whatever_a_name_stands_for_is_taken_where_the_name_is():
    """A name, a factory, a quantizer, an estimator as record or function, None."""
    x = jnp.linspace(-2, 2, 12).reshape(3, 4)
    soft = make_sign(lambda x, width: jnp.maximum(1 - jnp.abs(x) / width, 0))
    scaled = Estimator(lambda x: jnp.where(x > 0, 1.0, 0.0), code_set=(0, 1))

    def slopes(quantizer):
        return jax.grad(lambda x: dequantize(quantizer.apply(x)).sum())(x)

    make = partial(make_quantizer, ACTIVATION_QUANTIZERS)
    named = slopes(make("swish_sign", beta=2.0))
    for same in (swish_sign, ESTIMATORS["swish_sign"], ACTIVATION_QUANTIZERS["swish_sign"]):
        np.testing.assert_array_equal(slopes(make(same, beta=2.0)), named)
    np.testing.assert_allclose(slopes(make(soft, width=3.0)), np.maximum(1 - np.abs(x) / 3, 0), rtol=1e-6)
    assert make(scaled).code_set == (0, 1)
    assert make(ede_sign).wants == make("ede_sign").wants == ("progress",)
    quantizer = make("hwgq", bits=1)
    assert make(quantizer) is quantizer
    weights = make_quantizer(WEIGHT_QUANTIZERS, partial(learned_scale, initial="mean"))
    np.testing.assert_allclose(weights.init(jax.random.key(0), x)["scale"], np.abs(x).mean(0, keepdims=True), rtol=1e-6)
    identity = lambda y, key: y
    assert make_quantizer(GRADIENT_QUANTIZERS, identity) is identity
    assert make_quantizer(GRADIENT_QUANTIZERS, "dorefa", bits=3)(x, jax.random.key(0)) is x
    for table in (WEIGHT_QUANTIZERS, ACTIVATION_QUANTIZERS, GRADIENT_QUANTIZERS):
        assert make_quantizer(table, None) is make_quantizer(table, "full_precision") is None


@pytest.mark.parametrize(
    ("value", "options", "text"),
    [
        (3, {}, r"`input_quantizer` \(=3\) must be a name, a quantizer, an estimator, or a function of options"),
        ("hwgc", {}, r"`input_quantizer` \(='hwgc'\) is not known; did you mean 'hwgq'\?"),
        (swish_sign, {"beat": 1.0}, r"`option` \(='beat'\) is not known; did you mean 'beta'\?"),
        (None, {"bits": 2}, r"`option` \(='bits'\) is given to what takes no options; leave it out"),
        (stateless(binary), {"bits": 2}, r"`option` \(='bits'\) is given to what takes no options; leave it out"),
    ],
)
def test_errors_of_what_stands_for_no_quantizer(value, options, text):
    with pytest.raises(ValueError, match=text):
        make_quantizer(ACTIVATION_QUANTIZERS, value, argument="input_quantizer", **options)


@pytest.mark.parametrize("returned", [Quantized, lambda *q: (Quantized(*q), Quantized(*q))])
@pytest.mark.parametrize("table", [WEIGHT_QUANTIZERS, ACTIVATION_QUANTIZERS])
def test_a_function_that_quantizes_is_no_estimator(table, returned):
    """Its codes are not known; `stateless` is told them."""

    def halves(x):
        return returned(jnp.where(x > 0, 1.0, 0.0), jnp.asarray(0.5))

    text = r"`halves` is given as an estimator, .* returns (Quantized|tuple); .*: stateless\(halves, code_set="
    with pytest.raises(ValueError, match=text):
        make_quantizer(table, halves).apply(jnp.ones((2, 2)))
    quantizer = make_quantizer(table, stateless(halves, code_set=(0, 1)))
    assert quantizer.code_set == (0, 1) and len(bases(quantizer.apply(jnp.ones((2, 2))))) in (1, 2)


def test_bits_below_one():
    with pytest.raises(ValueError, match=r"`bits` \(=0\)"):
        evaluated(make_quantizer(WEIGHT_QUANTIZERS, "dorefa", bits=0), jnp.ones((2, 2)))


# Every method of binarization that the project sets out to have, by the place where it must be found.
CATALOGUE = {
    "estimators": (
        ESTIMATORS,
        {
            "identity": "identity_sign",
            "clipped straight-through": "ste_sign",
            "ApproxSign (Bi-Real)": "approx_sign",
            "tanh": "tanh_sign",
            "(2/cosh x)^2": "cosh_sign",
            "SignSwish (BNN+)": "swish_sign",
            "EDE (IR-Net)": "ede_sign",
            "training-aware (RBNN)": "rbnn_sign",
            "Gumbel-softmax": "gumbel_sign",
            "two-stage (DIR-Net)": "dir_sign",
            "coupled ternary (BinaryDuo)": "coupled_ternary",
            "sparse {0, 1} (Si-BNN)": "heaviside",
            "state-aware (SA-BNN)": "state_aware_sign",
            "long-tailed (Xu and Cheung)": "long_tailed_sign",
            "ternary (TBN)": "ternary",
            "Fourier (FDA)": "fda_sign",
        },
    ),
    "weights": (
        WEIGHT_QUANTIZERS,
        {
            "sign (BinaryNet)": "binary",
            "BinaryConnect": "binary_connect",
            "binarized after training": "post_training",
            "BWN and XNOR-Net": "xnor",
            "XNOR-Net++": "learned_scale",
            "BNN+": "bnn_plus",
            "DoReFa-Net": "dorefa",
            "WRPN": "wrpn",
            "LQ-Nets": "lq_net",
            "INQ": "inq",
            "ABC-Net": "abc_net",
            "IR-Net": "libra_pb",
            "DIR-Net": "dir_net",
            "RBNN": "rbnn",
            "ProxyBNN": "proxy",
            "Bi-Real": "magnitude_aware",
            "SA-BNN": "state_aware",
            "UaBNN": "c_sign",
            "BN-free": "bn_free",
            "ReCU": "recu",
            "AdaBin": "adabin",
            "BiPer": "biper",
            "StoMPP": "progressive",
            "FDA": "fda",
            "OvSW": "ovsw",
            "LSQ": "lsq",
            "DSQ": "dsq",
            "TTQ": "ttq",
            "TWN": "twn",
            "BitNet": "bitnet",
            "BitNet b1.58": "bitnet_b158",
        },
    ),
    "activations": (
        ACTIVATION_QUANTIZERS,
        {
            "RSign (ReActNet)": "rsign",
            "RBNN": "rbnn",
            "ReCU": "recu",
            "AdaBin": "adabin",
            "FDA": "fda",
            "StoMPP": "progressive",
            "LSQ": "lsq",
            "DSQ": "dsq",
            "ABC-Net": "abc_net",
            "DoReFa-Net": "dorefa",
            "PACT": "pact",
            "HWGQ": "hwgq",
            "WRPN": "wrpn",
            "LQ-Nets": "lq_net",
            "TBN": "tbn",
            "TBNv2": "tbn_v2",
            "residual (Tang et al.)": "residual",
            "unbalanced (IA-BNN)": "unbalanced",
            "Si-BNN": "sparse",
            "BinaryDuo, coupled": "coupled",
            "BinaryDuo, decoupled": "decoupled",
            "BitNet": "bitnet",
            "BiT": "elastic",
        },
    ),
    "gradients": (GRADIENT_QUANTIZERS, {"DoReFa-Net": "dorefa"}),
    "regularizers": (
        regularizers.REGULARIZERS,
        {
            "R1 (BNN+)": "manhattan",
            "R2 (BNN+)": "euclidean",
            "1 - w^2 (Tang et al.)": "tang",
            "scaled 1 - w^2": "scaled_tang",
        },
    ),
    "optimizers": (OPTIMIZERS, {"Deep Frank-Wolfe": "dfw", "Bop": "bop", "BNEW": "bnew", "OvSW": "ovsw"}),
}


@pytest.mark.parametrize(
    ("table", "name"),
    [(table, name) for table, methods in CATALOGUE.values() for name in methods.values()],
    ids=[f"{kind}: {method}" for kind, (_, methods) in CATALOGUE.items() for method in methods],
)
def test_the_catalogue_of_methods_is_complete(table, name):
    assert callable(getattr(table[name], "make", table[name]))


def test_methods_that_are_no_entry_of_a_table():
    """FULW's two branches, BinaryDuo's switch, XNOR-Net++'s output scales, PACT's decay, BinaryConnect's step scale."""
    found = (full_latent, decouple, OutputScale, regularizers.clipping_penalty, scale_latent_updates)
    assert all(callable(function) and function.__doc__ for function in found)
    # Adaptive gradient clipping (Brock et al.), with which networks without batch normalization are trained.
    assert "adaptive_clipping" in inspect.signature(make_optimizer).parameters
