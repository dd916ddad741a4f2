"""Numbers and pairs of them for sizes, strides, padding and windows; anything else is refused in a sentence."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bnn_jax.bitops.bits import max_pool as max_pool_of_words
from bnn_jax.layers import BinaryConv, BinaryDense, ChannelGate, conv, max_pool, mean_pool, scaled_conv
from bnn_jax.layers.convolution import resolve_padding
from bnn_jax.models import MODELS

pytestmark = pytest.mark.usefixtures("unchecked")

IMAGES = jnp.asarray(np.random.default_rng(0).normal(size=(2, 7, 6, 3)), jnp.float32)
WORDS = jnp.asarray(np.random.default_rng(0).integers(0, 2**32, (2, 7, 6, 1), dtype=np.uint32))
KERNEL = jnp.asarray(np.random.default_rng(1).normal(size=(3, 3, 3, 4)), jnp.float32)


def layer(**geometry):
    return BinaryConv(4, input_quantizer="ste_sign", kernel_quantizer="xnor", name="conv1", **geometry)


def compiled(function):
    """With its geometry set; as an argument of jit True would be the number 1."""
    return lambda **geometry: jax.jit(partial(function, **geometry))()


FUNCTIONS = {
    "layer": compiled(lambda **geometry: layer(**geometry).init_with_output(jax.random.key(0), IMAGES)[0]),
    "conv": compiled(partial(conv, IMAGES, KERNEL)),
    "scaled_conv": compiled(partial(scaled_conv, IMAGES, KERNEL, jnp.ones(()))),
    "max_pool": partial(max_pool, IMAGES),
    "mean_pool": lambda window=2, **geometry: mean_pool(IMAGES, window, **geometry),
    "max_pool of words": partial(max_pool, WORDS),
    "max_pool on bits": partial(max_pool_of_words, WORDS),
}
EQUAL = {
    "a number": (3, (3, 3)),
    "a list": ([1, np.int64(2)], (1, 2)),
}
PADDING = {
    "a number": (1, ((1, 1), (1, 1))),
    "a pair": ((1, 2), ((1, 1), (2, 2))),
    "a list": ([[1, 0], [0, 1]], ((1, 0), (0, 1))),
}
PAIRS = [
    ("layer", "kernel_size"),
    ("layer", "strides"),
    ("layer", "kernel_dilation"),
    ("conv", "strides"),
    ("conv", "dilation"),
    ("scaled_conv", "strides"),
    ("max_pool", "window"),
    ("max_pool", "strides"),
    ("mean_pool", "window"),
    ("mean_pool", "strides"),
    ("max_pool of words", "window"),
    ("max_pool on bits", "strides"),
]
BAD = [0, -1, True, 1.5, 2.0, "3", None, (), (1,), (0, 1), (1, 2.0), (True, True), (1, 2, 3), [2, -1]]


@pytest.mark.parametrize("kind", EQUAL)
@pytest.mark.parametrize(("name", "argument"), PAIRS)
def test_a_number_and_a_list_stand_for_a_pair(name, argument, kind):
    given, pair = EQUAL[kind]
    np.testing.assert_array_equal(FUNCTIONS[name](**{argument: given}), FUNCTIONS[name](**{argument: pair}))


@pytest.mark.parametrize("kind", PADDING)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_padding_is_a_number_a_pair_or_a_pair_of_pairs(name, kind):
    given, pads = PADDING[kind]
    np.testing.assert_array_equal(FUNCTIONS[name](padding=given), FUNCTIONS[name](padding=pads))


@pytest.mark.parametrize("word", ["SAME", "valid"])
@pytest.mark.parametrize("name", [name for name in FUNCTIONS if name != "max_pool on bits"])
def test_padding_has_two_names(name, word):
    """As XLA counts them: SAME gives ceil(size / stride), VALID what fits."""
    strides = {"strides": (2, 1)} if "pool" not in name else {"window": (3, 3), "strides": (2, 1)}
    sizes = {"shape": (7, 6), "kernel_size": (3, 3), "strides": (2, 1), "dilation": (1, 1)}
    pads = resolve_padding(word, **sizes)
    found = FUNCTIONS[name](padding=word, **strides)
    np.testing.assert_array_equal(found, FUNCTIONS[name](padding=pads, **strides))
    assert found.shape[1:3] == ((4, 6) if word == "SAME" else (3, 4))


@pytest.mark.parametrize("bad", BAD, ids=repr)
@pytest.mark.parametrize(("name", "argument"), PAIRS)
def test_other_pairs_are_refused(name, argument, bad):
    if bad is None and (("pool" in name and argument == "strides") or (name == "layer" and argument != "kernel_size")):
        return
    if argument == "kernel_size" and bad in ((1,), (1, 2, 3)):
        return
    where = " in layer 'conv1'" if name == "layer" else ""
    axes = r"one to three of them, as \(3, 3\)" if argument == "kernel_size" else r"a pair \(height, width\) of them"
    rule = rf"^`{argument}` \(=.*\) must be a positive whole number or {axes}{where}(\n|$)"
    with pytest.raises(ValueError, match=rule):
        FUNCTIONS[name](**{argument: bad})


@pytest.mark.parametrize("bad", [-1, True, 1.0, None, "full", (), (1, 2, 3), (1, -1), ((1, 1), (1,))], ids=repr)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_other_padding_is_refused(name, bad):
    with pytest.raises(ValueError, match=r"^`padding` \(=.*\) must be a whole number from 0 on, a pair .* right\)\)"):
        FUNCTIONS[name](padding=bad)


@pytest.mark.parametrize("bad", [0, -1, True, 2.0, "8", None, (8,)], ids=repr)
def test_numbers_of_features_are_refused(bad):
    layers = {
        BinaryConv: {"features": bad},
        BinaryDense: {"features": bad},
        ChannelGate: {"features": 2, "reduction": bad},
    }
    for kind, arguments in layers.items():
        with pytest.raises(ValueError, match=r"^`\w+` \(=.*\) must be a positive whole number in layer 'here'$"):
            kind(**arguments, name="here")


@pytest.mark.parametrize(
    ("network", "argument", "bad"),
    [
        ("lenet", "kernel_size", 2.0),
        ("lenet", "kernel_size", (5, 5)),
        ("lenet", "extra_layers", -1),
        ("lenet", "width", "8"),
        ("vgg_small", "dense_layers", True),
        ("vgg_small", "num_classes", None),
        ("resnet6", "stage_sizes", 2),
        ("resnet6", "stage_sizes", (1, 2.5)),
        ("resnet6", "stage_sizes", (True,)),
        ("bnas_a", "num_cells", (3,)),
    ],
)
def test_sizes_of_networks_are_refused(network, argument, bad):
    with pytest.raises(ValueError, match=rf"^`{argument}` \(=.*\) of \w+ must be a "):
        MODELS[network].constructor(**{"num_classes": 10} | {argument: bad})


def test_a_list_of_a_config_is_a_tuple_of_sizes():
    assert MODELS["resnet6"].constructor(num_classes=10, stage_sizes=[1, 2]).stage_sizes == (1, 2)
