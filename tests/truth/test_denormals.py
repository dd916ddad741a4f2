"""A number too small for float32's normal ones counts as zero, and so as +1, wherever its code is taken.

The oracle is NumPy, which computes with denormal numbers: the sign of a number after what is below 2^-126 has become 0.
"""

import re
from functools import partial
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bnn_jax.bitops.planes import unpack_codes
from bnn_jax.estimators import ESTIMATORS, heaviside, is_negative, sign
from bnn_jax.layers import BatchNorm, BinaryConv, BinaryDense
from bnn_jax.packed import freeze, verify
from bnn_jax.packed.tflite.model import tflite_bytes
from bnn_jax.quantizers import ACTIVATION_QUANTIZERS, make_quantizer

TINY = np.float32(2.0**-126)
NUMBERS = np.array(
    [-1e-45, -1e-42, -np.nextafter(TINY, np.float32(0)), -0.0, 0.0, 1e-45, 1e-42, TINY, -TINY, -2 * TINY, -1e-30, -1.0],
    np.float32,
)
SIGNS = np.array([1, 1, 1, 1, 1, 1, 1, 1, -1, -1, -1, -1], np.float32)
"""Written down, not computed."""
SHAPE = (4, 4, 3)


def written_out(x):
    """The rule in NumPy."""
    return np.where(np.where(np.abs(x) < TINY, 0, x) < 0, -1, 1)


def as_printed(latent):
    """The line of the documentation that takes codes from a checkpoint."""
    text = (Path(__file__).parents[2] / "docs" / "guides" / "runs.md").read_text()
    (line,) = re.findall(r"^codes = (numpy\.where\(.*\))  #", text, re.MULTILINE)
    return eval(line, {"numpy": np, "latent": latent})


WAYS = {
    "compiled": lambda f, x: jax.jit(f)(x),
    "compiled, of a constant": lambda f, x: jax.jit(lambda: f(jnp.asarray(x)))(),
    "by itself": lambda f, x: f(jnp.asarray(x)),
    "in a loop": lambda f, x: jax.lax.map(f, jnp.asarray(x)),
}


@pytest.mark.parametrize("way", WAYS)
def test_the_sign_is_the_same_in_every_program(way):
    np.testing.assert_array_equal(WAYS[way](sign, NUMBERS), SIGNS)
    np.testing.assert_array_equal(WAYS[way](is_negative, NUMBERS), SIGNS < 0)
    np.testing.assert_array_equal(written_out(NUMBERS), SIGNS)
    np.testing.assert_array_equal(as_printed(NUMBERS), SIGNS)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_narrower_numbers_are_those_that_float32_holds(dtype):
    """The denormal numbers of float16 are normal in float32, in which codes are taken."""
    x = np.asarray(jnp.asarray([-6e-8, -1e-5, -1.0, 0.0, 6e-8, -1e-42, -1e-30], dtype).astype(jnp.float32))
    np.testing.assert_array_equal(sign(jnp.asarray(x, dtype)).astype(jnp.float32), written_out(x))


PLAIN = [name for name, record in ESTIMATORS.items() if record.code_set == (-1, 1) and not record.stochastic]


@pytest.mark.parametrize("way", ["compiled", "compiled, of a constant"])
@pytest.mark.parametrize("name", PLAIN)
def test_every_sign_estimator(name, way):
    np.testing.assert_array_equal(WAYS[way](lambda x: ESTIMATORS[name](x), NUMBERS), SIGNS)


@pytest.mark.parametrize("way", ["compiled", "compiled, of a constant"])
def test_codes_of_zero_and_one(way):
    """Of denormal numbers of either sign 0; heaviside and the half-wave quantizer have 1 above zero alone."""
    hwgq = make_quantizer(ACTIVATION_QUANTIZERS, "hwgq", bits=1)
    for step in (heaviside, lambda x: hwgq.apply(x).codes):
        np.testing.assert_array_equal(WAYS[way](step, -NUMBERS), SIGNS < 0)


class Network(nn.Module):
    """Two binary layers; a threshold where the first norm stands."""

    @nn.compact
    def __call__(self, images, *, train):
        quantizers = {"input_quantizer": "ste_sign", "kernel_quantizer": "binary"}
        x = BinaryConv(12, padding=1, name="conv", **quantizers)(images, train=train)
        x = BatchNorm(name="norm")(x, train=train)
        x = BinaryDense(4, name="head", **quantizers)(x.reshape(-1, 192), train=train)
        return BatchNorm(name="head_norm")(x, train=train)


def variables_of(model):
    """Latent weights and gammas drawn from NUMBERS, betas that are denormal or zero."""
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(partial(model.init, train=False), jax.random.key(0), jnp.zeros((1, *SHAPE)))

    def draw(path, leaf):
        name = path[-1].key
        if name in ("latent_kernel", "scale"):
            # Products with gammas of a few 2^-126 are denormal; the interpreter of tflite files computes with these.
            some = NUMBERS if name == "latent_kernel" else NUMBERS[(np.abs(NUMBERS) < TINY) | (NUMBERS < -3 * TINY)]
            return jnp.asarray(rng.choice(some, leaf.shape))
        if name == "bias":
            return jnp.asarray(rng.choice(np.float32([-1e-42, 1e-42, 0]), leaf.shape))
        return jnp.asarray(rng.integers(1, 4, leaf.shape), jnp.float32)

    return jax.tree_util.tree_map_with_path(draw, shapes)


@pytest.fixture(scope="module")
def images():
    """Pixels that are denormal, zero or not."""
    return jnp.asarray(np.random.default_rng(1).choice(NUMBERS, (5, *SHAPE)))


@pytest.fixture(scope="module")
def network():
    """The module, its variables and their packed form."""
    model = Network()
    variables = variables_of(model)
    return model, variables, freeze(model, variables, SHAPE)


def test_a_packed_network_has_the_codes_of_the_trained_one_and_of_numpy(network, images):
    """Also where the variables are constants of the program, as of `jit(lambda images: apply(variables, images))`."""
    model, variables, packed = network
    for name in ("conv", "head"):
        latent, kernel = variables["params"][name]["latent_kernel"], packed["packed"][name]["kernel"]
        codes = unpack_codes(kernel.bases[0], kernel.shape)
        np.testing.assert_array_equal(codes, as_printed(np.asarray(latent)))
    found = verify(model, variables, packed, [images])
    assert found.passed and found.largest_logit_difference == 0
    constants = jax.jit(lambda images: model.apply(variables, images, train=False))
    arguments = jax.jit(partial(model.apply, train=False))
    np.testing.assert_array_equal(constants(images), arguments(variables, images))


def test_a_tflite_file_has_these_codes(network):
    """Its numbers are no denormal ones; it is interpreted by NumPy, on pixels that are normal."""
    pytest.importorskip("flatbuffers", reason="the package flatbuffers is not installed")
    from tflite_interpreter import interpret, read

    model, variables, _ = network
    images = np.random.default_rng(2).normal(size=(5, *SHAPE)).astype(np.float32)
    data = tflite_bytes(model, variables, SHAPE)
    constants = [array for array in read(data).arrays if array is not None and array.dtype == np.float32]
    assert all(((array == 0) | (np.abs(array) >= TINY)).all() for array in constants)
    logits = jax.jit(partial(model.apply, train=False))(variables, images)
    np.testing.assert_allclose(interpret(data, images), logits, 1e-5, 0)
