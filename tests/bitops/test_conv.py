"""Packed convolutions: equal to the float convolution for shapes, strides, dilations, groups, paddings, pad values."""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import export, lax

from bnn_jax.bitops.conv import (
    Geometry,
    binary_conv_general_dilated,
    explicit_padding,
    outside,
    patch_words,
    tap_sums,
    unit_conv,
)


class Case(NamedTuple):
    """One convolution."""

    batch: int
    shape: tuple[int, int]
    channels: int
    features: int
    kernel_size: tuple[int, int]
    strides: tuple[int, int]
    padding: str | tuple[tuple[int, int], tuple[int, int]]
    dilation: tuple[int, int]
    groups: int
    pad_value: int


def random_codes(*shape, seed=0):
    return np.random.default_rng(seed).choice([-1.0, 1.0], shape)


def operands(case, seed=0):
    x = random_codes(case.batch, *case.shape, case.channels, seed=seed)
    return x, random_codes(*case.kernel_size, case.channels // case.groups, case.features, seed=seed + 1)


def pack_in_numpy(bits):
    """Words of the last axis, by an independent packer."""
    bits = np.pad(bits, [(0, 0)] * (bits.ndim - 1) + [(0, -bits.shape[-1] % 32)])
    return np.packbits(np.ascontiguousarray(bits), axis=-1, bitorder="little").view(np.uint32)


def packed_operands(case, x, kernel):
    lhs = pack_in_numpy(x.reshape(*x.shape[:3], case.groups, -1) > 0).reshape(*x.shape[:3], -1)
    return lhs, np.ascontiguousarray(pack_in_numpy(kernel.reshape(-1, case.features).T > 0).T)


def packed_conv(case, lhs, rhs):
    return binary_conv_general_dilated(
        lhs,
        rhs,
        case.strides,
        case.padding,
        case.dilation,
        kernel_size=case.kernel_size,
        channels=case.channels,
        feature_group_count=case.groups,
        pad_value=case.pad_value,
    )


def crop_or_pad(x, padding, value):
    for axis, (low, high) in enumerate(padding, 1):
        x = x.take(range(max(-low, 0), x.shape[axis] - max(-high, 0)), axis)
    pads = [(0, 0), *[(max(low, 0), max(high, 0)) for low, high in padding], (0, 0)]
    return np.pad(x, pads, constant_values=value)


def float_conv(case, x, kernel):
    """Tap by tap and group by group in float64."""
    x = crop_or_pad(
        x, explicit_padding(case.padding, case.shape, case.kernel_size, case.strides, case.dilation), case.pad_value
    )
    (kh, kw), (sh, sw), (dh, dw) = case.kernel_size, case.strides, case.dilation
    height, width = (x.shape[1] - (kh - 1) * dh - 1) // sh + 1, (x.shape[2] - (kw - 1) * dw - 1) // sw + 1
    y = np.zeros((case.batch, height, width, case.groups, case.features // case.groups))
    x = x.reshape(*x.shape[:3], case.groups, -1)
    kernel = kernel.reshape(*kernel.shape[:3], case.groups, -1)
    for i in range(kh):
        for j in range(kw):
            rows, columns = slice(i * dh, i * dh + height * sh, sh), slice(j * dw, j * dw + width * sw, sw)
            y += np.einsum("bhwgc,cgf->bhwgf", x[:, rows, columns][:, :height, :width], kernel[i, j])
    return y.reshape(case.batch, height, width, case.features)


def check(case, seed=0):
    x, kernel = operands(case, seed)
    y = jax.jit(partial(packed_conv, case))(*packed_operands(case, x, kernel))
    assert y.dtype == jnp.int32
    np.testing.assert_array_equal(y, float_conv(case, x, kernel))


@st.composite
def cases(draw):
    pair = lambda low, high: (draw(st.integers(low, high)), draw(st.integers(low, high)))
    groups = draw(st.sampled_from([1, 1, 1, 2, 3]))
    channels = groups * draw(st.sampled_from([1, 3, 8, 31, 32, 33, 64, 70]))
    kernel_size, strides, dilation, shape = pair(1, 3), pair(1, 3), pair(1, 2), pair(5, 9)
    padding = draw(st.sampled_from(["SAME", "VALID", "pairs"]))
    padding = (pair(-1, 3), pair(-1, 3)) if padding == "pairs" else padding
    features = groups * draw(st.integers(1, 4))
    pad_value = draw(st.sampled_from([-1, 0, 1]))
    batch = draw(st.integers(1, 2))
    reach = [(k - 1) * d + 1 for k, d in zip(kernel_size, dilation)]
    shape = tuple(max(n, r + 2) for n, r in zip(shape, reach))
    return Case(batch, shape, channels, features, kernel_size, strides, padding, dilation, groups, pad_value)


@settings(max_examples=60)
@given(cases(), st.integers(0, 2**16))
def test_packed_is_equal_to_float(case, seed):
    check(case, seed)


@pytest.mark.full
@settings(max_examples=2000)
@given(cases(), st.integers(0, 2**16))
def test_packed_is_equal_to_float_in_two_thousand_examples(case, seed):
    check(case, seed)


SAME = ((1, 1), (1, 1))
KNOWN = Case(2, (6, 7), 40, 3, (3, 3), (1, 1), SAME, (1, 1), 1, 0)


@pytest.mark.parametrize("pad_value", [-1, 0, 1])
@pytest.mark.parametrize("change", [{}, {"strides": (2, 2)}, {"dilation": (2, 1)}, {"channels": 64}, {"channels": 2}])
def test_every_pad_value_is_exact_at_the_borders(pad_value, change):
    check(KNOWN._replace(pad_value=pad_value, **change))


@pytest.mark.parametrize(
    "change", [{}, {"channels": 66, "groups": 2, "features": 4, "pad_value": 1}, {"strides": (2, 1)}]
)
def test_the_convolution_on_matrix_units_is_the_same(change):
    case = KNOWN._replace(padding=((1, 2), (-1, 1)), **change)
    x, kernel = operands(case)
    geometry = Geometry(case.kernel_size, case.strides, case.padding, case.dilation)
    options = {"geometry": geometry, "channels": case.channels, "groups": case.groups, "pad_value": case.pad_value}
    y = jax.jit(partial(unit_conv, **options))(*packed_operands(case, x, kernel))
    assert y.dtype == jnp.int32
    np.testing.assert_array_equal(y, float_conv(case, x, kernel))


def test_an_exported_convolution_takes_any_batch_and_holds_the_program_of_each_platform():
    case = KNOWN._replace(groups=2, features=4)
    x, kernel = operands(case)
    lhs, rhs = packed_operands(case, x, kernel)
    batch = export.symbolic_shape("batch")[0]
    shapes = jax.ShapeDtypeStruct((batch, *lhs.shape[1:]), lhs.dtype), jax.ShapeDtypeStruct(rhs.shape, rhs.dtype)
    exported = export.export(jax.jit(partial(packed_conv, case)), platforms=("cpu", "cuda", "tpu"))(*shapes)
    assert "popcnt" in exported.mlir_module()
    assert "stablehlo.convolution" in exported.mlir_module()
    np.testing.assert_array_equal(exported.call(lhs, rhs), float_conv(case, x, kernel))


def test_the_oracle_agrees_with_lax():
    case = KNOWN._replace(groups=2, features=4, strides=(2, 1))
    x, kernel = operands(case)
    expected = lax.conv_general_dilated(
        x.astype(np.float32),
        kernel.astype(np.float32),
        case.strides,
        case.padding,
        rhs_dilation=case.dilation,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=2,
    )
    np.testing.assert_array_equal(float_conv(case, x, kernel), expected)


def test_a_window_larger_than_the_image_gives_an_empty_result():
    case = KNOWN._replace(shape=(2, 7), padding="VALID")
    lhs, rhs = packed_operands(case, *operands(case))
    assert jax.jit(partial(packed_conv, case))(lhs, rhs).shape == (2, 0, 5, 3)


@pytest.mark.parametrize("channels", [1, 3, 16, 33, 64])
def test_patch_words_join_the_pixels_without_gaps(channels):
    x = random_codes(2, 4, 5, channels) > 0
    patches_of = jax.jit(lambda words: patch_words(words, channels, (3, 2), (1, 2), ((1, 0), (0, 1)), (1, 1)))
    words = patches_of(pack_in_numpy(x))
    padded = np.pad(x, ((0, 0), (1, 0), (0, 1), (0, 0)))
    patches = [padded[b, i : i + 3, j : j + 2].ravel() for b in range(2) for i in range(3) for j in range(0, 5, 2)]
    np.testing.assert_array_equal(np.stack(words, 1), pack_in_numpy(np.stack(patches)))


@pytest.mark.parametrize("channels", [1, 5, 32, 33, 96])
def test_tap_sums_are_the_sums_over_the_channels(channels):
    kernel = random_codes(2, 3, channels, 4)
    sums = jax.jit(partial(tap_sums, kernel_size=(2, 3), channels=channels))(
        pack_in_numpy(kernel.reshape(-1, 4).T > 0).T
    )
    np.testing.assert_array_equal(sums, kernel.sum(2).reshape(6, 4))


@pytest.mark.parametrize(
    ("strides", "padding", "dilation"), [((1, 1), SAME, (1, 1)), ((2, 1), ((3, 0), (-1, 2)), (1, 2))]
)
def test_outside_is_where_a_convolution_of_ones_is_incomplete(strides, padding, dilation):
    case = KNOWN._replace(batch=1, channels=1, features=1, strides=strides, padding=padding, dilation=dilation)
    inside = float_conv(case, np.ones((1, 6, 7, 1)), np.ones((3, 3, 1, 1)))
    taps = outside((6, 7), (3, 3), strides, padding, dilation)
    np.testing.assert_array_equal(9 - taps.sum(1), inside.ravel())


WORDS, FILTERS = jnp.zeros((1, 4, 4, 2), jnp.uint32), jnp.zeros((18, 8), jnp.uint32)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"pad_value": 2}, r"`pad_value` \(=2\) must be 0, \+1 or -1"),
        ({"lhs": WORDS.astype(jnp.int32)}, r"`lhs` \(dtype=int32\) must be packed words, uint32"),
        ({"rhs": FILTERS.astype(jnp.int32)}, r"`rhs` \(dtype=int32\) must be packed words, uint32"),
        ({"channels": 65}, r"`channels` \(=65\) in 1 groups take 3 words a pixel; got 2 in `lhs`"),
        ({"rhs": FILTERS[:17]}, r"`rhs` has 17 words a filter; `kernel_size` \(=\(3, 3\)\) and 64 channels take 18"),
        ({"feature_group_count": 3}, r"`feature_group_count` \(=3\) must divide the 64 channels and the 8 features"),
        ({"padding": "FULL"}, r"`padding` \(='FULL'\) must be SAME, VALID or"),
    ],
)
def test_bad_input_is_refused(change, text):
    good = {"lhs": WORDS, "rhs": FILTERS, "padding": "SAME", "kernel_size": (3, 3), "channels": 64}
    call = partial(binary_conv_general_dilated, window_strides=(1, 1))
    assert jax.eval_shape(partial(call, **good)).shape == (1, 4, 4, 8)
    with pytest.raises(ValueError, match=text):
        call(**good | change)


def test_patch_words_refuse_other_channels():
    with pytest.raises(ValueError, match=r"`channels` \(=32\) take 1 words; got 2 in `lhs`"):
        patch_words(WORDS, 32, (3, 3), (1, 1), SAME)
