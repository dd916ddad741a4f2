"""Products of packed codes: equal to those of the numbers, for every code set, shape, stride, dilation and padding."""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import export, lax

from bnn_jax.bitops.bits import pack
from bnn_jax.bitops.conv import Geometry
from bnn_jax.bitops.planes import PackedBase, conv_product, dense_product, multiplies_on_bits, pack_codes

BINARY, TERNARY, BITS, TWO_BITS, ODD = (-1, 1), (-1, 0, 1), (0, 1), (0, 1, 2, 3), (-3, -1, 1, 3)
ONE = (1,)
SETS = [(x, w) for x in (BINARY, TERNARY, BITS, TWO_BITS, ODD) for w in (BINARY, TERNARY, ODD)]
SETS += [(BINARY, ONE), (ONE, BINARY), (ONE, ONE)]
PRODUCTS = [pair for pair in SETS if multiplies_on_bits(*pair)]


class Case(NamedTuple):
    """One convolution: its code sets and shapes."""

    values: tuple[int, ...] = BINARY
    kernel_values: tuple[int, ...] = BINARY
    batch: int = 2
    shape: tuple[int, int] = (6, 7)
    channels: int = 40
    features: int = 3
    kernel_size: tuple[int, int] = (3, 3)
    strides: tuple[int, int] = (1, 1)
    padding: tuple[tuple[int, int], tuple[int, int]] = ((1, 1), (1, 1))
    dilation: tuple[int, int] = (1, 1)
    pad_value: int = 0


def drawn(values, *shape, seed=0):
    return np.random.default_rng(seed).choice(np.float32(values), shape)


def base_of(kernel, values=BINARY):
    return PackedBase(pack_codes(jnp.asarray(kernel), values), None, values)


def operands(case, seed=0):
    x = drawn(case.values, case.batch, *case.shape, case.channels, seed=seed)
    return x, drawn(case.kernel_values, *case.kernel_size, case.channels, case.features, seed=seed + 1)


def product_of(case):
    """The packed convolution as a function of codes, or words, and of the packed kernel."""
    return partial(
        conv_product,
        values=case.values,
        shape=(*case.kernel_size, case.channels, case.features),
        geometry=Geometry(case.strides, case.padding, case.dilation),
        pad_value=case.pad_value,
    )


def crop_or_pad(x, padding, value):
    for axis, (low, high) in enumerate(padding, 1):
        x = x.take(range(max(-low, 0), x.shape[axis] - max(-high, 0)), axis)
    pads = [(0, 0), *[(max(low, 0), max(high, 0)) for low, high in padding], (0, 0)]
    return np.pad(x, pads, constant_values=value)


def float_conv(case, x, kernel):
    """Tap by tap in float64."""
    x = crop_or_pad(x, case.padding, case.pad_value).astype(np.float64)
    (kh, kw), (sh, sw), (dh, dw) = case.kernel_size, case.strides, case.dilation
    height, width = (x.shape[1] - (kh - 1) * dh - 1) // sh + 1, (x.shape[2] - (kw - 1) * dw - 1) // sw + 1
    y = np.zeros((case.batch, height, width, case.features))
    for i in range(kh):
        for j in range(kw):
            rows, columns = slice(i * dh, i * dh + height * sh, sh), slice(j * dw, j * dw + width * sw, sw)
            y += x[:, rows, columns][:, :height, :width] @ kernel[i, j]
    return y


def check(case, seed=0):
    x, kernel = operands(case, seed)
    y = jax.jit(product_of(case))(x, base_of(kernel, case.kernel_values))
    assert y.dtype == jnp.int32
    np.testing.assert_array_equal(y, float_conv(case, x, kernel))


@st.composite
def cases(draw):
    pair = lambda low, high: (draw(st.integers(low, high)), draw(st.integers(low, high)))
    values, kernel_values = draw(st.sampled_from([(BINARY, BINARY), *PRODUCTS]))
    kernel_size, strides, dilation, shape = pair(1, 3), pair(1, 3), pair(1, 2), pair(5, 9)
    reach = [(k - 1) * d + 1 for k, d in zip(kernel_size, dilation)]
    return Case(
        values,
        kernel_values,
        draw(st.integers(1, 2)),
        tuple(max(n, r + 2) for n, r in zip(shape, reach)),
        draw(st.sampled_from([1, 3, 8, 31, 32, 33, 64, 70])),
        draw(st.integers(1, 4)),
        kernel_size,
        strides,
        (pair(-1, 3), pair(-1, 3)),
        dilation,
        draw(st.sampled_from([-1, 0, 1])),
    )


@settings(max_examples=25)
@given(cases(), st.integers(0, 2**16))
@pytest.mark.full
def test_a_convolution_of_packed_codes_is_that_of_the_numbers(case, seed):
    check(case, seed)


@pytest.mark.full
@settings(max_examples=2000)
@given(cases(), st.integers(0, 2**16))
def test_two_thousand_convolutions_of_packed_codes(case, seed):
    check(case, seed)


CHANGES = [{"dilation": (2, 1)}, {"channels": 64}, {"channels": 2}]
CHANGES += [pytest.param(change, marks=pytest.mark.default_flags) for change in ({}, {"strides": (2, 2)})]


@pytest.mark.parametrize("pad_value", [-1, 0, 1])
@pytest.mark.parametrize("change", CHANGES)
def test_every_pad_value_is_exact_at_the_borders(pad_value, change):
    check(Case(pad_value=pad_value, **change))


def test_words_are_taken_in_the_place_of_codes():
    x, kernel = operands(Case())
    y = jax.jit(product_of(Case()))(pack(jnp.asarray(x > 0)), base_of(kernel))
    np.testing.assert_array_equal(y, float_conv(Case(), x, kernel))


def test_an_exported_convolution_takes_any_batch_and_holds_the_program_of_each_platform():
    """CPUs count bits; the other platforms multiply int8 codes on matrix units."""
    case = Case(padding=((1, 2), (-1, 1)), strides=(2, 1))
    x, kernel = operands(case)
    base = base_of(kernel)
    images = jax.ShapeDtypeStruct((export.symbolic_shape("batch")[0], *x.shape[1:]), x.dtype)
    function = lambda x, words: product_of(case)(x, PackedBase(words, None, BINARY))
    exported = export.export(jax.jit(function), platforms=("cpu", "cuda", "tpu"))(images, base.words)
    assert "popcnt" in exported.mlir_module()
    assert "xi8>" in exported.mlir_module()
    np.testing.assert_array_equal(exported.call(x, base.words), float_conv(case, x, kernel))


def test_the_oracle_agrees_with_lax():
    case = Case(strides=(2, 1))
    x, kernel = operands(case)
    dimensions = {"rhs_dilation": case.dilation, "dimension_numbers": ("NHWC", "HWIO", "NHWC")}
    expected = lax.conv_general_dilated(x, kernel, case.strides, case.padding, **dimensions)
    np.testing.assert_array_equal(float_conv(case, x, kernel), expected)


def test_a_window_larger_than_the_image_gives_an_empty_result():
    case = Case(shape=(2, 7), padding=((0, 0), (0, 0)))
    x, kernel = operands(case)
    assert jax.jit(product_of(case))(x, base_of(kernel)).shape == (2, 0, 5, 3)


# One word, one row, one column, no row, no column, and both sides of the bounds of the tilings.
SHAPES = [
    (3, 5, 4),
    (1, 1, 1),
    (1, 300, 7),
    (2, 33, 70),
    (1, 1152, 2),
    (7, 1185, 5),
    (3, 64, 1030),
    (0, 40, 3),
    (3, 40, 0),
]


@pytest.mark.parametrize(("m", "k", "n"), SHAPES)
def test_a_dense_product_of_packed_codes_is_that_of_the_numbers(m, k, n):
    x, kernel = drawn(BINARY, m, k), drawn(BINARY, k, n, seed=1)
    y = jax.jit(partial(dense_product, values=BINARY, shape=(k, n)))(x, base_of(kernel))
    assert y.dtype == jnp.int32
    np.testing.assert_array_equal(y, x @ kernel)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("channels", [1, 2, 4, 32, 33])
def test_inputs_of_other_channels_are_refused(channels):
    """Three channels and four are one word each: nothing else would show it."""
    text = rf"`x` \(of shape \(.*, {channels}\)\) must have the 3 channels of the kernel as its last axis"
    with pytest.raises(ValueError, match=text):
        dense_product(drawn(BINARY, 2, channels), base_of(drawn(BINARY, 3, 5)), values=BINARY, shape=(3, 5))
    case = Case(channels=3)
    with pytest.raises(ValueError, match=text):
        product_of(case)(drawn(BINARY, 2, 6, 6, channels), base_of(operands(case)[1]))


@pytest.mark.parametrize(("values", "kernel_values"), PRODUCTS)
def test_a_dense_product_of_any_code_sets_is_that_of_the_numbers(values, kernel_values):
    x, kernel = drawn(values, 3, 40), drawn(kernel_values, 40, 5, seed=1)
    y = jax.jit(partial(dense_product, values=values, shape=(40, 5)))(x, base_of(kernel, kernel_values))
    np.testing.assert_array_equal(y, x @ kernel)
