"""Arrays of another shape, dtype or range than a function names are refused in a sentence, or are loud where traced."""

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from jaxtyping import Array, Float, Num

from bnn_jax.analysis.accounting import account
from bnn_jax.bitops.bits import max_pool as max_pool_of_words
from bnn_jax.bitops.planes import PackedBase, dense_product
from bnn_jax.checks import check_arrays
from bnn_jax.layers import (
    BatchNorm,
    BinaryConv,
    BinaryDense,
    ChannelGate,
    ChannelInteractions,
    OutputScale,
    PReLU,
    RPReLU,
    avg_pool_2x2,
    batch_norm,
    conv,
    max_pool,
    mean_pool,
    scaled_conv,
)
from bnn_jax.losses import LOSSES, augmented_margins, make_loss
from bnn_jax.optim import deep_frank_wolfe
from bnn_jax.packed import freeze
from bnn_jax.regularizers import REGULARIZERS

pytestmark = pytest.mark.usefixtures("unchecked")
KEY = jax.random.key(0)
BATCH, CLASSES = 4, 3
FUNCTIONS = {name: loss.apply for name, loss in LOSSES.items()} | {"augmented_margins": augmented_margins}


def logits_of(classes: int = CLASSES) -> jax.Array:
    return jnp.asarray(np.random.default_rng(0).normal(size=(BATCH, classes)), jnp.float32)


# ---- labels


LABELS = {
    "a column": (np.zeros((4, 1), int), r"`labels` of `{}` \(of shape \(4, 1\)\) must be of shape \(batch=4\)"),
    "a scalar": (np.int32(0), r"`labels` of `{}` \(of shape \(\)\) must be of shape \(batch=4\)"),
    "one too few": (np.zeros(3, int), r"`labels` of `{}` \(of shape \(3,\)\) must be of shape \(batch=4\)"),
    "one hot": (np.eye(4, 3, dtype=int), r"`labels` of `{}` \(of shape \(4, 3\)\) must be of shape \(batch=4\)"),
    "float": (np.zeros(4), r"`labels` of `{}` must be an integer array; got float64; convert it with `.astype`"),
    "bool": (np.zeros(4, bool), r"`labels` of `{}` must be an integer array; got bool"),
    "a list": ([0, 1, 2, 0], r"`labels` of `{}` must be an integer array; got list; use `jnp.asarray`"),
    "below 0": (np.array([0, 1, -1, 2]), r"`labels` \(=-1\) must be from 0 to 2, one of the 3 columns of `logits`"),
    "from 1 on": (np.array([1, 2, 3, 1]), r"`labels` \(=3\) must be from 0 to 2.*; subtract 1 from labels that count"),
    "byte": (np.array([0, 1, 2, 255], np.uint8), r"`labels` \(=255\) must be from 0 to 2"),
}


@pytest.mark.parametrize("kind", LABELS)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_labels_are_refused(name, kind):
    labels, sentence = LABELS[kind]
    with pytest.raises((TypeError, ValueError), match=sentence.format(name)):
        FUNCTIONS[name](logits_of(), labels)


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("logits", [jnp.zeros(4), jnp.zeros((4, 3, 1)), jnp.zeros((4, 3), jnp.int32), [[0.0, 1.0]]])
def test_logits_are_refused(name, logits):
    with pytest.raises((TypeError, ValueError), match=rf"`logits` of `{name}` "):
        FUNCTIONS[name](logits, np.zeros(4, int))


def value_and_gradient(name: str, logits: jax.Array, labels: jax.Array):
    value, pullback = jax.vjp(lambda f: FUNCTIONS[name](f, labels), logits)
    return value, pullback(jnp.ones_like(value))[0]


COMPILED = {name: jax.jit(partial(value_and_gradient, name)) for name in FUNCTIONS}


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("dtype", ["int32", "uint8", "int8"])
def test_traced_labels_out_of_range_are_loud_and_the_others_untouched(name, dtype):
    labels = np.array([0, CLASSES, 2, 1], dtype)
    labels[3] = 200 if dtype == "uint8" else -1
    value, gradient = COMPILED[name](logits_of(), jnp.asarray(labels))
    expected, slope = COMPILED[name](logits_of(), jnp.array([0, 0, 2, 0], dtype))
    wrong = np.array([False, True, False, True])
    for found, right in ((value, expected), (gradient, slope)):
        assert np.isnan(found[wrong]).all()
        np.testing.assert_array_equal(found[~wrong], right[~wrong])


def test_bytes_are_labels_of_more_than_256_classes_too():
    logits, labels = logits_of(300), np.array([0, 7, 200, 255], np.uint8)
    for name in FUNCTIONS:
        found = FUNCTIONS[name](logits, labels)
        np.testing.assert_array_equal(found, FUNCTIONS[name](logits, labels.astype(np.int32)))


def label_arrays() -> st.SearchStrategy[np.ndarray]:
    """Labels of any rank, size, dtype and range, for batches of four and three classes."""
    shapes = st.sampled_from([(), (3,), (5,), (4, 1), (1, 4), (4, 3), (0,)]) | st.just((4,))
    dtypes = st.sampled_from(["int8", "int16", "int32", "uint8", "uint32", "bool", "float16", "float32", "complex64"])

    @st.composite
    def arrays(draw):
        shape, dtype = draw(shapes), np.dtype(draw(dtypes))
        least = -(2**7) if dtype.kind == "i" else 0
        numbers = st.integers(0, CLASSES) | st.integers(least, 127)
        size = int(np.prod(shape))
        return np.array(draw(st.lists(numbers, min_size=size, max_size=size))).reshape(shape).astype(dtype)

    return arrays()


def check_that_right_refused_or_loud(name: str, labels: np.ndarray) -> None:
    """Right labels give finite losses; others are refused, and where traced refused or NaN, forward and backward."""
    integers = labels.dtype.kind in "iu"
    wrong = (labels < 0) | (labels >= CLASSES) if integers else np.ones_like(labels, bool)
    fits = labels.shape == (BATCH,) and integers
    try:
        eager = FUNCTIONS[name](logits_of(), labels)
    except (TypeError, ValueError) as error:
        assert (not fits or wrong.any()) and str(error).startswith("`labels` ")
    else:
        assert fits and not wrong.any() and np.isfinite(eager).all()
    try:
        value, gradient = COMPILED[name](logits_of(), jnp.asarray(labels))
    except (TypeError, ValueError) as error:
        assert not fits and str(error).startswith("`labels` ")
    else:
        assert fits
        for found in (value, gradient):
            np.testing.assert_array_equal(np.isnan(found.reshape(BATCH, -1)).all(1), wrong)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.sampled_from(sorted(FUNCTIONS)), label_arrays())
def test_any_labels_are_right_refused_or_loud(name, labels):
    check_that_right_refused_or_loud(name, labels)


@pytest.mark.full
@settings(max_examples=500, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(label_arrays())
def test_five_hundred_labels_are_right_refused_or_loud_in_every_loss(labels):
    for name in FUNCTIONS:
        check_that_right_refused_or_loud(name, labels)


def test_deep_frank_wolfe_is_told_of_labels_that_count_from_1(standard_dtypes):
    loss, optimizer = make_loss("smoothed_multiclass_hinge"), deep_frank_wolfe(1.0)
    x, w = logits_of(8).T, {"kernel": jnp.zeros((BATCH, CLASSES))}

    @jax.jit
    def step(w, labels):
        objective = lambda w: loss.apply(x @ w["kernel"], labels).mean()
        value, gradient = jax.value_and_grad(objective)(w)
        return value, gradient, optimizer.update(gradient, optimizer.init(w), w, value=value)

    value, gradient, _ = step(w, jnp.arange(8) % CLASSES + 1)
    assert np.isnan(value) and np.isnan(gradient["kernel"]).any()
    assert np.isfinite(step(w, jnp.arange(8) % CLASSES)[0])


# ---- layers and functions


IMAGES, ROWS = jnp.ones((2, 4, 4, 3)), jnp.ones((2, 3))
PACKED = PackedBase(jnp.ones((1, 1, 2), jnp.uint32), None, (-1, 1))
CALLS = {
    "ChannelGate": (lambda x: ChannelGate(2, reduction=1).init(KEY, x), IMAGES),
    "max_pool": (max_pool, IMAGES),
    "mean_pool": (lambda x: mean_pool(x, 2), IMAGES),
    "avg_pool_2x2": (avg_pool_2x2, IMAGES),
    "conv": (lambda x: conv(x, jnp.ones((1, 1, 3, 2))), IMAGES),
    "scaled_conv": (lambda x: scaled_conv(x, jnp.ones((1, 1, 3, 2)), jnp.ones(())), IMAGES),
    "batch_norm": (lambda x: batch_norm(x, jnp.ones(3), jnp.ones(3)), jnp.ones((2, 3))),
    "max_pool of words": (max_pool_of_words, jnp.ones((2, 4, 4, 3), jnp.uint32)),
    "dense_product": (
        lambda x: dense_product(
            x, PackedBase(jnp.ones((1, 1, 2), jnp.uint32), None, (-1, 1)), values=(-1, 1), shape=(3, 2)
        ),
        ROWS,
    ),
}


@pytest.mark.parametrize("name", CALLS)
def test_arrays_of_another_rank_are_refused(name):
    call, right = CALLS[name]
    jax.eval_shape(call, right)
    wrong = right[0, ..., :2] if name == "batch_norm" else right[0]
    with pytest.raises(ValueError, match=rf"` of `{name.split()[0]}` \(of shape \(.*\)\) must be of shape \("):
        jax.eval_shape(call, wrong)


LAYERS = {
    "BinaryConv": (BinaryConv(2), IMAGES),
    "BinaryDense": (BinaryDense(2), ROWS),
    "BatchNorm": (partial(BatchNorm().init_with_output, train=False), IMAGES),
    "ChannelGate": (ChannelGate(2, reduction=1), IMAGES),
    "ChannelInteractions": (ChannelInteractions(), ROWS),
    "OutputScale": (OutputScale(), IMAGES),
    "PReLU": (PReLU(), ROWS),
    "RPReLU": (RPReLU(), ROWS),
}


@pytest.mark.parametrize("dtype", ["uint8", "uint32"])
@pytest.mark.parametrize("name", LAYERS)
def test_integers_are_no_inputs_of_layers(name, dtype):
    layer, right = LAYERS[name]
    run = layer.init_with_output if isinstance(layer, nn.Module) else layer
    run(KEY, right)
    with pytest.raises(
        TypeError, match=rf"`x.dtype` \(='{dtype}'\) .*'{name}'; images of 0..255|` of `{name}` must be"
    ):
        run(KEY, right.astype(dtype))


@pytest.mark.parametrize("name", ["max_pool of words", "dense_product"])
def test_functions_of_bits_refuse_others(name):
    call, right = CALLS[name]
    with pytest.raises(TypeError, match=r"must be a (uint32|numerical) array; got bool"):
        call(right.astype(bool))


@pytest.mark.parametrize("name", REGULARIZERS)
def test_regularizers_refuse_integers_and_scales_of_other_shapes(name):
    with pytest.raises(TypeError, match="`w` must be a floating-point array; got int32"):
        REGULARIZERS[name](jnp.ones((2, 3), jnp.int32), 1.0)
    if name != "l2":
        with pytest.raises(ValueError, match=r"`scale` must be a scalar or one value a feature, shape \(1, 3\)"):
            REGULARIZERS[name](jnp.ones((2, 3)), jnp.ones(3))


def test_names_stand_for_one_size_and_marks_for_several():
    @check_arrays
    def call(
        x: Float[Array, "batch *inner n"], scale: float | Float[Array, "#n"] = 1.0, y: Num[Array, "2 n"] | None = None
    ):
        return x

    x = jnp.ones((5, 3, 4))
    for arguments in ({}, {"scale": 2.0}, {"scale": jnp.ones(1)}, {"scale": jnp.ones(4)}, {"y": jnp.ones((2, 4))}):
        assert call(x, **arguments) is x
    assert call(x[0]).shape == (3, 4)
    for arguments, shown in (({"scale": jnp.ones(3)}, r"\(#n=4\)"), ({"y": jnp.ones((3, 4))}, r"\(2, n=4\)")):
        with pytest.raises(ValueError, match=rf"must be of shape {shown}"):
            call(x, **arguments)
    with pytest.raises(ValueError, match=r"`x` of `call` \(of shape \(4,\)\) must be of shape \(batch, \*inner, n\)"):
        call(x[0, 0])


# ---- dense layers of tokens


class Tokens(nn.Module):
    """Two binary dense layers over the tokens of an image, and a head."""

    norm: bool = False

    @nn.compact
    def __call__(self, images, *, train):
        binary = {"input_quantizer": "ste_sign", "kernel_quantizer": "xnor"}
        x = BinaryDense(32, **binary, name="mix")(images.reshape(len(images), 16, 64), train=train)
        x = BatchNorm(name="norm")(x, train=train) if self.norm else x
        x = BinaryDense(8, **binary, use_bias=True, name="last")(x, train=train)
        return x.mean(1), {}


@pytest.mark.parametrize(
    ("leading", "dtype"), [((2, 16), "bfloat16"), ((2, 3, 4), "float32"), ((), "float32")], ids=str
)
def test_dense_layers_take_any_leading_axes(leading, dtype):
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(*leading, 64)), dtype)
    layer = BinaryDense(5, input_quantizer="ste_sign", kernel_quantizer="xnor", use_bias=True)
    variables = layer.init(KEY, x)
    run = lambda v, x: layer.apply(v, x).astype(jnp.float32)
    y, pullback = jax.vjp(run, variables, x)
    assert y.shape == (*leading, 5)
    rows = x.reshape(-1, 64)
    expected, pullback_of_rows = jax.vjp(run, variables, rows)
    np.testing.assert_array_equal(y, expected.reshape(y.shape))
    g = jnp.asarray(rng.normal(size=expected.shape), jnp.float32)
    (of_variables, of_x), (wanted, wanted_x) = pullback(g.reshape(y.shape)), pullback_of_rows(g)
    jax.tree.map(np.testing.assert_array_equal, of_variables, wanted)
    np.testing.assert_array_equal(of_x.reshape(rows.shape), wanted_x)
    kernel = np.asarray(variables["params"]["latent_kernel"], np.float64)
    signs = lambda a: np.where(np.asarray(a, np.float64) < 0, -1, 1)
    np.testing.assert_allclose(expected, signs(rows) @ signs(kernel) * np.abs(kernel).mean(0), rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("norm", [False, True])
def test_tokens_freeze_and_are_counted(norm):
    model, images = Tokens(norm), jnp.asarray(np.random.default_rng(0).normal(size=(2, 8, 8, 16)), jnp.float32)
    variables = model.init(KEY, images, train=False)
    packed = freeze(model, variables, images.shape[1:])
    run = jax.jit(lambda v: model.apply(v, images, train=False)[0])
    np.testing.assert_array_equal(run(packed), run(variables))
    layers = {layer.name: layer for layer in account(partial(model.apply, train=False), variables, images[:1]).layers}
    assert layers["mix/latent_kernel"].macs.binary == 16 * 64 * 32
    assert layers["last/latent_kernel"].macs.binary == 16 * 32 * 8
    # Words are taken of a frozen normalization alone.
    with pytest.raises(TypeError, match=r"`x.dtype` \(='uint32'\) must be floating-point in layer 'mix'"):
        model.apply(packed, images.astype(jnp.uint32), train=False)
