"""Convolutions of any rank: equal to Flax's in full precision, and to float64 sums, trained and on bits, with codes."""

from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bnn_jax.layers import BinaryConv, BinaryConvTranspose
from bnn_jax.packed import take_path
from bnn_jax.quantizers import ACTIVATION_QUANTIZERS

KEY = jax.random.key(0)


def drawn_arguments(rng) -> tuple[dict[str, Any], tuple[int, ...]]:
    """Valid arguments of a convolution of Flax, each in one of its forms, and the shape of an input."""
    rank, groups = int(rng.integers(1, 4)), int(rng.choice([1, 1, 2, 4]))
    batch = tuple(rng.integers(1, 3, rng.choice([0, 1, 1, 2])).tolist())
    numbers = lambda most: tuple(rng.integers(1, most + 1, rank).tolist())
    some = lambda most: [int(rng.integers(1, most + 1)), numbers(most), None, list(numbers(most))][rng.integers(4)]
    size, dilation = numbers(3), some(2)
    steps = dilation if isinstance(dilation, tuple | list) else (dilation or 1,) * rank
    window = [(k - 1) * d + 1 for k, d in zip(size, steps)]
    words = ["SAME", "VALID", "SAME_LOWER", "CIRCULAR", "REFLECT"] + ["CAUSAL"] * (rank == 1)
    given = [int(rng.integers(0, 3)), tuple(rng.integers(0, 3, rank).tolist())]
    given += [tuple(map(tuple, rng.integers(0, 3, (rank, 2)).tolist()))]
    named = rng.random() < 0.5
    arguments = {
        "features": groups * int(rng.integers(1, 3)),
        "kernel_size": size[0] if rank == 1 and len(batch) < 2 and rng.random() < 0.5 else size,
        "strides": some(3),
        "padding": str(rng.choice(words)) if named else given[rng.integers(3)],
        "kernel_dilation": dilation,
        "input_dilation": rng.choice([1, None]) if named else some(2),
        "feature_group_count": groups,
        "use_bias": bool(rng.random() < 0.5),
    }
    spatial = [w + int(rng.integers(0, 3)) for w in window]
    return arguments, (*batch, *spatial, groups * int(rng.integers(1, 3)))


def check_like_flax(ours, theirs, shape, seed=0):
    """Output and gradients of two layers with the same parameters."""
    x = jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)
    shapes = jax.eval_shape(theirs.init, KEY, x)
    assert jax.eval_shape(ours.init, KEY, x) == shapes
    rng = np.random.default_rng(seed + 1)
    variables = jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=leaf.shape), jnp.float32), shapes)

    @jax.jit
    def both(variables, x):
        results = []
        for layer in (ours, theirs):
            y, pullback = jax.vjp(layer.apply, variables, x)
            results.append((y, pullback(jnp.cos(jnp.arange(y.size, dtype=y.dtype)).reshape(y.shape))))
        return results

    found, wanted = map(jax.tree.leaves, both(variables, x))
    for a, b in zip(found, wanted, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5 * max(1.0, float(jnp.abs(b).max(initial=0))))


FEW = [pytest.param(seed, marks=() if seed < 8 else pytest.mark.full) for seed in range(100)]


@pytest.mark.parametrize("seed", FEW)
def test_in_full_precision_it_is_the_convolution_of_flax(seed):
    arguments, shape = drawn_arguments(np.random.default_rng(seed))
    check_like_flax(BinaryConv(**arguments), nn.Conv(**arguments), shape, seed)


@pytest.mark.parametrize(
    "arguments",
    [
        {"kernel_size": (3,), "padding": "SAME", "strides": 2},
        {"kernel_size": (2, 3), "padding": "VALID", "strides": (1, 3)},
        {"kernel_size": (3, 2), "padding": "SAME", "strides": (4, 1), "kernel_dilation": (1, 2), "use_bias": True},
        {"kernel_size": (3, 3), "padding": ((2, 1), (0, 3)), "strides": 2, "use_bias": True},
        {"kernel_size": (2, 1, 2), "padding": 1, "strides": (1, 2, 2)},
    ],
    ids=str,
)
def test_in_full_precision_it_is_the_transposed_convolution_of_flax(arguments):
    arguments = {"features": 3, "use_bias": False} | arguments
    shape = (*(2, 4, 5, 3)[: len(arguments["kernel_size"]) + 1], 2)
    check_like_flax(BinaryConvTranspose(**arguments), nn.ConvTranspose(**arguments), shape)


IMAGE, SIGNAL = (2, 6, 6, 4), (2, 6, 4)
REFUSED = {
    "groups of features": (
        {"feature_group_count": 2, "features": 3},
        IMAGE,
        r"`feature_group_count` \(=2\) .* divides",
    ),
    "groups of channels": (
        {"feature_group_count": 3},
        IMAGE,
        r"`feature_group_count` \(=3\) must divide the 4 channels",
    ),
    "no groups": ({"feature_group_count": 0}, IMAGE, r"`feature_group_count` \(=0\) must be a positive whole number"),
    "strides of another rank": ({"strides": (1,)}, IMAGE, r"`strides` \(=\(1,\)\) .* a pair \(height, width\)"),
    "strides of none": ({"strides": 0}, IMAGE, r"`strides` \(=\(0, 0\)|`strides` \(=0\)"),
    "a negative dilation": (
        {"kernel_dilation": (1, -1)},
        IMAGE,
        r"`kernel_dilation` \(=\(1, -1\)\) must be a positive",
    ),
    "an input dilation of none": (
        {"input_dilation": 0, "padding": 1},
        IMAGE,
        r"`input_dilation` \(=.*\) must be a pos",
    ),
    "a window of no pixels": ({"kernel_size": (3, 0)}, IMAGE, r"`kernel_size` \(=\(3, 0\)\) must be a positive whole"),
    "padding by another name": ({"padding": "FULL"}, IMAGE, r"`padding` \(='FULL'\) .* REFLECT or CAUSAL"),
    "padding of another rank": ({"padding": (1, 1, 1)}, IMAGE, r"`padding` \(=\(1, 1, 1\)\) must be a whole number"),
    "causal images": (
        {"padding": "CAUSAL"},
        IMAGE,
        r"`padding` \(='CAUSAL'\) is of convolutions with one spatial axis",
    ),
    "named padding of spread images": (
        {"padding": "SAME", "input_dilation": 2},
        IMAGE,
        r"`padding` \(='SAME'\) is not known for an `input_dilation`",
    ),
    "an image for a volume": (
        {"kernel_size": (1, 1, 1, 1)},
        SIGNAL,
        r"`kernel_size` \(=\(1, 1, 1, 1\)\) must be a positive whole number or one to three of them",
    ),
    "no pixels' axis": ({}, (5, 4), r"`x.shape` \(=\(5, 4\)\) must be \(..., height, width, channels\)"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_flax_refuses_is_refused_in_a_sentence(name):
    arguments, shape, text = REFUSED[name]
    arguments = {"features": 6, "kernel_size": (3, 3), "name": "here"} | arguments
    x = jnp.ones(shape)
    with pytest.raises(Exception):  # noqa: B017
        jax.eval_shape(nn.Conv(**arguments).init, KEY, x)
    with pytest.raises(ValueError, match=rf"^{text}.*in layer 'here'"):
        jax.eval_shape(BinaryConv(**arguments).init, KEY, x)


@pytest.mark.parametrize(
    ("layer", "arguments", "text"),
    [
        (BinaryConv, {"kernel_size": ()}, r"`kernel_size` \(=\(\)\) must be a positive whole number or one to three"),
        (BinaryConvTranspose, {"input_dilation": 2, "padding": 1}, r"`input_dilation` \(=2\) must stay 1"),
        (BinaryConvTranspose, {"padding": "CIRCULAR"}, r"`padding` \(='CIRCULAR'\) must .* SAME or VALID in layer"),
        (
            BinaryConv,
            {"input_quantizer": "ste_sign", "input_scaling": True, "feature_group_count": 2},
            r"`input_scaling` \(=True\) has one map for all channels",
        ),
    ],
)
def test_impossible_layers_are_refused(layer, arguments, text):
    with pytest.raises(ValueError, match=f"^{text}"):
        layer(4, **arguments)


class Case(NamedTuple):
    """A layer of codes and the shape of its inputs."""

    arguments: dict[str, Any]
    shape: tuple[int, ...]
    transposed: bool = False


TWO_BITS = ACTIVATION_QUANTIZERS["dorefa"](bits=2)


@st.composite
def cases(draw):
    rank, groups = draw(st.integers(1, 3)), draw(st.sampled_from([1, 1, 2, 3]))
    numbers = lambda most: draw(st.tuples(*[st.integers(1, most)] * rank))
    size, dilation, transposed = numbers(3), numbers(2), draw(st.booleans()) and draw(st.booleans())
    spread = numbers(2) if draw(st.booleans()) and not transposed else (1,) * rank
    pads = draw(st.tuples(*[st.tuples(st.integers(0, 2), st.integers(0, 2))] * rank))
    words = ["SAME", "VALID"] if transposed else ["SAME", "VALID", "CIRCULAR", "REFLECT"] + ["CAUSAL"] * (rank == 1)
    arguments = {
        "features": groups * draw(st.integers(1, 2)),
        "kernel_size": size,
        "strides": numbers(2),
        "padding": pads if set(spread) != {1} else draw(st.sampled_from([pads, *words])),
        "kernel_dilation": dilation,
        "input_dilation": spread,
        "feature_group_count": groups,
        "pad_value": draw(st.sampled_from([-1, 0, 1])),
        "input_quantizer": draw(st.sampled_from(["ste_sign", TWO_BITS])),
        "kernel_quantizer": draw(st.sampled_from(["binary", "twn"])),
    }
    window = [(k - 1) * d + 1 for k, d in zip(size, dilation)]
    batch = draw(st.sampled_from([(), (2,), (1, 2)]))
    shape = (*batch, *(w + draw(st.integers(0, 2)) for w in window), groups * draw(st.sampled_from([1, 3, 33])))
    return Case(arguments, shape, transposed)


def surrounded(codes, arguments):
    """Codes with what lies around and between them: float64, for a convolution without padding."""
    rank, padding, steps = len(arguments["kernel_size"]), arguments["padding"], arguments["input_dilation"]
    window = [(k - 1) * d + 1 for k, d in zip(arguments["kernel_size"], arguments["kernel_dilation"])]
    around = lambda x, pads, **mode: np.pad(x, [(0, 0), *pads, (0, 0)], **mode)
    if padding in ("CIRCULAR", "REFLECT"):
        mode = {"CIRCULAR": "wrap", "REFLECT": "reflect"}[padding]
        codes, padding = around(codes, [((w - 1) // 2, w // 2) for w in window], mode=mode), "VALID"
    if padding == "SAME":
        needed = zip(codes.shape[1:-1], arguments["strides"], window)
        totals = [max(0, (-(-n // s) - 1) * s + w - n) for n, s, w in needed]
        padding = [(total // 2, total - total // 2) for total in totals]
    padding = {"VALID": [(0, 0)] * rank, "CAUSAL": [(window[0] - 1, 0)]}.get(str(padding), padding)
    between = np.zeros((len(codes), *((n - 1) * s + 1 for n, s in zip(codes.shape[1:-1], steps)), codes.shape[-1]))
    between[(slice(None), *(slice(None, None, step) for step in steps))] = codes
    return around(between, padding, constant_values=arguments["pad_value"])


def sums(codes, kernel, arguments):
    """Tap by tap and group by group, float64."""
    groups, strides = arguments["feature_group_count"], arguments["strides"]
    x, channels = surrounded(codes, arguments), kernel.shape[-2]
    size, features = kernel.shape[:-2], kernel.shape[-1] // groups
    window = [(k - 1) * d + 1 for k, d in zip(size, arguments["kernel_dilation"])]
    out = [(n - w) // s + 1 for n, w, s in zip(x.shape[1:-1], window, strides)]
    y = np.zeros((len(x), *out, groups * features))
    for place in np.ndindex(*size):
        starts = [i * d for i, d in zip(place, arguments["kernel_dilation"])]
        taken = tuple(slice(a, a + (m - 1) * s + 1, s) for a, m, s in zip(starts, out, strides))
        for g in range(groups):
            of_x, of_y = slice(g * channels, (g + 1) * channels), slice(g * features, (g + 1) * features)
            y[..., of_y] += x[(slice(None), *taken)][..., of_x] @ kernel[place][:, of_y]
    return y


def as_convolution(case):
    """The arguments of the convolution that a transposed one is."""
    if not case.transposed:
        return case.arguments
    strides, padding = case.arguments["strides"], case.arguments["padding"]
    window = [(k - 1) * d + 1 for k, d in zip(case.arguments["kernel_size"], case.arguments["kernel_dilation"])]
    if padding == "VALID":
        padding = [(w - 1, max(w, s) - 1) for w, s in zip(window, strides)]
    elif padding == "SAME":
        total = [w + s - 2 for w, s in zip(window, strides)]
        low = [w - 1 if s >= w else -(-t // 2) for w, s, t in zip(window, strides, total)]
        padding = [(a, t - a) for a, t in zip(low, total)]
    return case.arguments | {"strides": (1,) * len(strides), "input_dilation": strides, "padding": padding}


def check(case, seed):
    """Integers of the trained layer, of the frozen one on either path, and of numpy."""
    layer = (BinaryConvTranspose if case.transposed else BinaryConv)(**case.arguments)
    rng = np.random.default_rng(seed)
    x = jnp.asarray(rng.normal(size=case.shape), jnp.float32)
    shapes = jax.eval_shape(layer.init, KEY, x)["params"]
    variables = {"params": {"latent_kernel": jnp.asarray(rng.normal(size=shapes["latent_kernel"].shape), jnp.float32)}}

    @jax.jit
    def run(variables, x):
        _, frozen = layer.apply(variables, x, mutable=["packed"])
        forms = [variables, *(take_path(frozen, path) for path in ("bits", "float32"))]
        return [layer.apply(form, x, mutable=["products"]) for form in forms]

    (y, trained), *packed = run(variables, x)
    signed = case.arguments["input_quantizer"] == "ste_sign"
    codes = np.where(x >= 0, 1, -1) if signed else np.round(np.clip(x, 0, 1) * np.float32(3))
    (kernel,) = trained["products"]["weights"][0]
    rank = len(case.arguments["kernel_size"])
    codes = codes.reshape(-1, *codes.shape[-rank - 1 :])
    wanted = sums(codes, np.asarray(kernel, np.float64), as_convolution(case))
    assert y.shape == case.shape[: -rank - 1] + wanted.shape[1:]
    for output, found in [(y, trained), *packed]:
        np.testing.assert_array_equal(found["products"]["integers"][0], wanted)
        np.testing.assert_array_equal(found["products"]["weights"][0][0], kernel)
        np.testing.assert_allclose(output, y, rtol=1e-6)


@settings(max_examples=8)
@given(cases(), st.integers(0, 2**16))
def test_the_integers_trained_frozen_and_in_numpy_are_the_same(case, seed):
    check(case, seed)


@pytest.mark.full
@settings(max_examples=500)
@given(cases(), st.integers(0, 2**16))
def test_five_hundred_convolutions(case, seed):
    check(case, seed)


@pytest.mark.parametrize(
    ("arguments", "shape"),
    [
        ({"kernel_size": (3,), "feature_group_count": 2, "padding": "CAUSAL"}, (2, 9, 6)),
        pytest.param(
            {"kernel_size": (3, 3), "feature_group_count": 6, "strides": 2}, (1, 2, 5, 5, 6), marks=pytest.mark.full
        ),
        pytest.param(
            {"kernel_size": (2, 2, 2), "input_dilation": 2, "padding": 1}, (2, 3, 3, 2, 6), marks=pytest.mark.full
        ),
    ],
    ids=str,
)
def test_bfloat16_inputs_give_the_integers_of_float32_and_their_gradients_rounded(arguments, shape):
    layer = BinaryConv(6, input_quantizer="ste_sign", kernel_quantizer="binary", **arguments)
    x = jnp.asarray(np.random.default_rng(0).normal(size=shape), jnp.bfloat16).astype(jnp.float32)
    variables = layer.init(KEY, x)

    @jax.jit
    def run(variables, x):
        y, pullback = jax.vjp(layer.apply, variables, x)
        return y, *pullback(jnp.ones_like(y))

    (y, of_kernel, of_x), (narrow, of_kernel_too, of_narrow) = run(variables, x), run(variables, x.astype(jnp.bfloat16))
    assert (narrow.dtype, of_narrow.dtype) == (jnp.bfloat16, jnp.bfloat16)
    np.testing.assert_array_equal(narrow.astype(jnp.float32), y.astype(jnp.bfloat16).astype(jnp.float32))
    np.testing.assert_array_equal(of_narrow.astype(jnp.float32), of_x.astype(jnp.bfloat16).astype(jnp.float32))
    for a, b in zip(jax.tree.leaves(of_kernel_too), jax.tree.leaves(of_kernel), strict=True):
        assert a.dtype == jnp.float32
        np.testing.assert_array_equal(a, b)


@pytest.mark.full
@pytest.mark.parametrize("padding", [1, "CIRCULAR"])
def test_the_map_of_input_scales_has_the_rank_of_the_convolution(padding):
    x = np.random.default_rng(0).normal(size=(2, 9, 5)).astype(np.float32)
    arguments = {"kernel_size": (3,), "padding": padding, "input_quantizer": "ste_sign", "kernel_quantizer": "binary"}
    layers = [BinaryConv(4, **arguments, input_scaling=scaling) for scaling in (True, False)]
    variables = layers[0].init(KEY, x)
    scaled, y = (np.asarray(layer.apply(variables, x)) for layer in layers)
    edges = {"mode": "wrap"} if padding == "CIRCULAR" else {}
    magnitude = np.pad(np.abs(x).mean(-1), ((0, 0), (1, 1)), **edges)
    means = np.stack([magnitude[:, i : i + 3].mean(-1) for i in range(9)], 1)
    np.testing.assert_allclose(scaled, y * means[..., None], rtol=1e-5)


def test_a_number_for_a_size_does_not_tell_the_axes_of_a_batch_of_videos():
    x = jnp.ones((1, 4, 4, 4, 4, 2))
    with pytest.raises(ValueError, match=r"`kernel_size` \(=3\) must be a tuple, which tells the spatial axes, for"):
        BinaryConv(8, kernel_size=3).init(KEY, x)
    assert BinaryConv(8, kernel_size=(3, 3, 3), padding=1).init_with_output(KEY, x)[0].shape == (1, 4, 4, 4, 4, 8)
