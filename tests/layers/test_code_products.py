"""Convolutions of codes on bits in training: the same bits as from numbers, whatever the codes turn out to be."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bnn_jax.bitops.conv import Geometry
from bnn_jax.layers import BinaryConv, code_products, scaled_conv
from bnn_jax.layers.code_products import chosen_execution
from bnn_jax.models.build import build_model

SIGNS, BITS = (-1, 1), (0, 1)
GEOMETRIES = [
    {"padding": 1},
    {"padding": "SAME", "strides": 2},
    {"padding": "VALID", "dilation": (1, 2)},
    {"padding": ((2, 0), (0, 1)), "strides": (1, 2)},
]


def drawn(values, shape, seed, dtype=np.float32):
    return jnp.asarray(np.random.default_rng(seed).choice(values, shape), dtype)


def outputs_and_gradients(x, codes, scale, **options):
    def run(x, codes, scale):
        y, pullback = jax.vjp(lambda *operands: scaled_conv(*operands, **options), x, codes, scale)
        return y, pullback(jnp.sin(jnp.arange(y.size, dtype=y.dtype)).reshape(y.shape))

    return jax.tree.map(np.asarray, jax.jit(run)(x, codes, scale))


def uses_bits(function, *arguments):
    """Whether a compiled function counts bits."""
    return "popcnt" in jax.jit(function).lower(*arguments).as_text()


def assert_same_bits(found, wanted):
    same = jax.tree.map(lambda a, b: (a.dtype, a.shape, a.tobytes()) == (b.dtype, b.shape, b.tobytes()), found, wanted)
    assert jax.tree.all(same), same


@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
@pytest.mark.parametrize("sets", [(SIGNS, SIGNS), (BITS, SIGNS)], ids=str)
def test_bits_and_numbers_give_the_same_bits(geometry, sets):
    x, codes = drawn(sets[0], (6, 7, 8, 20), 0), drawn(sets[1], (3, 3, 20, 5), 1)
    scale = jnp.linspace(0.1, 0.7, 5).reshape(1, 1, 1, 5)
    on_bits, numbers = (
        outputs_and_gradients(x, codes, scale, sets=sets, execution=execution, **geometry)
        for execution in ("bits", "float32")
    )
    assert_same_bits(on_bits, numbers)
    assert on_bits[0].dtype == np.float32 and np.abs(on_bits[0]).max() > 1


def test_bits_against_sums_in_float64():
    x, codes = drawn(SIGNS, (4, 5, 6, 9), 2), drawn(SIGNS, (3, 3, 9, 4), 3)
    found = scaled_conv(x, codes, jnp.ones(()), padding=1, sets=(SIGNS, SIGNS), execution="bits")
    padded, kernel = np.pad(np.float64(x), ((0, 0), (1, 1), (1, 1), (0, 0))), np.float64(codes)
    sums = [[np.tensordot(padded[:, i : i + 3, j : j + 3], kernel, 3) for j in range(6)] for i in range(5)]
    np.testing.assert_array_equal(found, np.moveaxis(np.array(sums), 2, 0))


def test_narrow_activations_on_bits():
    x, codes = drawn(SIGNS, (4, 6, 6, 16), 4, jnp.bfloat16), drawn(SIGNS, (3, 3, 16, 8), 5)
    options = {"padding": 1, "sets": (SIGNS, SIGNS)}
    found = outputs_and_gradients(x, codes, jnp.ones(()), execution="bits", **options)
    assert_same_bits(found, outputs_and_gradients(x, codes, jnp.ones(()), execution="float32", **options))
    assert found[0].dtype == np.float32


@pytest.mark.parametrize("strange", [np.nan, 0.5, 0.0, -3.0, np.inf])
@pytest.mark.parametrize("place", ["x", "codes"])
def test_what_is_not_of_its_set_is_multiplied_as_a_number(strange, place):
    operands = {"x": drawn(SIGNS, (4, 6, 6, 16), 6), "codes": drawn(SIGNS, (3, 3, 16, 8), 7)}
    operands[place] = operands[place].at[1, 2, 3, 4].set(strange)
    options = {"padding": 1, "sets": (SIGNS, SIGNS)}
    found = outputs_and_gradients(**operands, scale=jnp.ones(()), execution="bits", **options)
    wanted = outputs_and_gradients(**operands, scale=jnp.ones(()), execution="float32", **options)
    jax.tree.map(np.testing.assert_array_equal, found, wanted)
    assert np.isfinite(wanted[0]).all() == np.isfinite(strange)


def test_mapped_over_kernels_each_is_as_alone():
    x, codes = drawn(SIGNS, (4, 6, 6, 16), 8), drawn(SIGNS, (3, 3, 3, 16, 8), 9).at[1, 0, 0, 0].set(0.25)
    one = lambda codes, execution: scaled_conv(
        x, codes, jnp.ones(()), padding=1, sets=(SIGNS, SIGNS), execution=execution
    )
    mapped = jax.jit(jax.vmap(lambda codes: one(codes, "bits")))(codes)
    np.testing.assert_array_equal(mapped, jnp.stack([one(kernel, "float32") for kernel in codes]))


def test_the_faster_is_chosen_by_shape():
    unit = Geometry((1, 1), ((1, 1), (1, 1)), (1, 1))
    sets, shapes = (SIGNS, SIGNS), ((128, 32, 32, 16), (3, 3, 16, 16))
    assert chosen_execution(sets, *shapes, unit) == "bits"
    assert chosen_execution((SIGNS, (-1, 0, 1)), *shapes, unit) == "float32"
    assert chosen_execution(((), SIGNS), *shapes, unit) == "float32"
    assert chosen_execution(sets, *shapes, unit._replace(strides=(2, 2))) == "float32"
    assert chosen_execution(sets, *shapes, unit._replace(groups=2)) == "float32"
    assert chosen_execution(sets, (1, *shapes[0][1:]), shapes[1], unit) == "float32"
    pointwise = unit._replace(padding=((0, 0), (0, 0)))
    assert chosen_execution(sets, shapes[0], (1, 1, 16, 256), pointwise) == "float32"


def layer_of(**options):
    return BinaryConv(16, input_quantizer="ste_sign", kernel_quantizer="xnor", **options)


def test_a_layer_takes_bits_unless_it_is_told_otherwise():
    x = jnp.asarray(np.random.default_rng(10).normal(size=(16, 8, 8, 16)), jnp.float32)
    variables = layer_of().init(jax.random.key(0), x)
    assert uses_bits(layer_of().apply, variables, x)
    assert not uses_bits(layer_of(execution="float32").apply, variables, x)
    assert not uses_bits(layer_of(input_dilation=2, padding=1, execution="bits").apply, variables, x)
    assert not uses_bits(BinaryConv(16, kernel_quantizer="xnor").apply, variables, x)
    found = jax.jit(layer_of().apply)(variables, x)
    assert_same_bits(np.asarray(found), np.asarray(jax.jit(layer_of(execution="float32").apply)(variables, x)))


def test_a_network_tells_its_layers():
    images = jnp.zeros((16, 8, 8, 3))
    for execution, bits in ((None, True), ("float32", False)):
        model = build_model("resnet6", num_classes=10, width=16, options={"execution": execution})
        variables = model.init(jax.random.key(0), images, train=False)
        assert uses_bits(partial(model.apply, train=False), variables, images) == bits


@pytest.mark.parametrize("name", ["resnet6", "mnist_mlp"])
def test_a_network_refuses_another_execution(name):
    with pytest.raises(
        ValueError, match=r"`execution` \(='bit'\) of \w+ must be None \(the faster\) or one of bits, float32"
    ):
        build_model(name, num_classes=10, options={"execution": "bit"})


def test_twenty_steps_of_training_are_the_same_bit_for_bit():
    rng = np.random.default_rng(11)
    images = jnp.asarray(rng.normal(size=(20, 16, 8, 8, 3)), jnp.float32)
    labels = jnp.asarray(rng.integers(0, 10, (20, 16)))

    def trained(execution):
        model = build_model("resnet6", num_classes=10, width=16, options={"execution": execution})
        variables = model.init(jax.random.key(0), images[0], train=False)

        def step(variables, batch):
            def loss(params):
                (logits, _), updated = model.apply(
                    {**variables, "params": params}, batch[0], train=True, mutable=["batch_stats"]
                )
                return -jnp.take_along_axis(jax.nn.log_softmax(logits), batch[1][:, None], 1).mean(), updated

            gradients, updated = jax.grad(loss, has_aux=True)(variables["params"])
            return {"params": jax.tree.map(lambda p, g: p - 0.1 * g, variables["params"], gradients), **updated}, None

        program = jax.jit(lambda variables: jax.lax.scan(step, variables, (images, labels))[0])
        return jax.tree.map(np.asarray, program(variables))

    start = build_model("resnet6", num_classes=10, width=16).init(jax.random.key(0), images[0], train=False)["params"]
    on_bits, numbers = trained(None), trained("float32")
    assert_same_bits(on_bits, numbers)
    moved = jax.tree.map(lambda a, b: np.abs(a - np.asarray(b)).max(), on_bits["params"], start)
    assert max(jax.tree.leaves(moved)) > 0.01


@pytest.mark.parametrize(
    ("make", "layer"),
    [
        (lambda: layer_of(execution="bit"), " in layer 'BinaryConv'"),
        (lambda: scaled_conv(jnp.ones((1, 2, 2, 1)), jnp.ones((1, 1, 1, 1)), jnp.ones(()), execution="bit"), ""),
    ],
)
def test_another_execution_is_refused(make, layer):
    with pytest.raises(ValueError) as error:
        make()
    assert str(error.value) == f"`execution` (='bit') {code_products.EXECUTION_RULE}{layer}"
