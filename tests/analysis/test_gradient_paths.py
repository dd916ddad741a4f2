"""The paper's statements about its blocks, and that a path is where a gradient really passes."""

import random
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import ShapeDtypeStruct, lax

from bnn_jax.analysis.gradient_paths import gradient_paths, module_gradient_paths, operations, path_graph, smallest
from bnn_jax.estimators import make_sign
from bnn_jax.layers import BatchNorm, BinaryConv, BinaryDense
from bnn_jax.models.birealnet import bireal18, ebireal18
from bnn_jax.models.densenet import IGPDenseBlock
from bnn_jax.models.fractal import FractalBlock, igp_resnet69
from bnn_jax.models.resnet import resnet20
from bnn_jax.quantizers import ACTIVATION_QUANTIZERS, WEIGHT_QUANTIZERS, make_quantizer, mark, with_estimator
from bnn_jax.quantizers.binary import binary

BINARY = {
    "input_quantizer": make_quantizer(ACTIVATION_QUANTIZERS, "approx_sign"),
    "kernel_quantizer": make_quantizer(WEIGHT_QUANTIZERS, "xnor"),
}
CONV = partial(BinaryConv, padding=1, **BINARY)


def cost(size, c_in, c_out, kernel=3):
    return size * size * kernel * kernel * c_in * c_out


class Block(nn.Module):
    """`wire` gets x and unit(x, features, stride=1) = BN(binary conv3x3(x))."""

    wire: callable

    @nn.compact
    def __call__(self, x, *, train):
        def unit(x, features, stride=1):
            return BatchNorm()(BinaryConv(features, strides=(stride, stride), padding=1, **BINARY)(x), train=train)

        return self.wire(x, unit)


def resnet_block(x, unit):
    return nn.relu(unit(nn.relu(unit(x, 64)), 64) + x)


def bireal_block(x, unit):
    y = x + unit(x, 64)
    return y + unit(y, 64)


def ebireal_block(x, unit):
    return bireal_block(x, unit) + x


def dense_pair(x, unit):
    for _ in range(2):
        x = jnp.concatenate([x, unit(x, 32)], -1)
    return x


def igp_dense_block(x, unit):
    a, b = unit(x, 32), unit(x, 32)
    return jnp.concatenate([x, (a + unit(a, 32) + b) / 2], -1)


def fractal(columns):
    def wire(x, unit):
        short = x + unit(x, x.shape[-1])
        if columns == 1:
            return short
        return (wire_below(wire_below(x, unit), unit) + short) / 2

    wire_below = fractal(columns - 1) if columns > 1 else None
    return wire


N = cost(56, 64, 64)
N1, N2 = cost(28, 128, 32), cost(28, 160, 32)
INNER = cost(28, 32, 32)


@pytest.mark.parametrize(
    "wire, shape, costs, lengths",
    [
        (resnet_block, (56, 56, 64), (0, 2 * N), (0, 2)),
        (bireal_block, (56, 56, 64), (0, N, 2 * N), (0, 1, 2)),
        (ebireal_block, (56, 56, 64), (0, N, 2 * N), (0, 1, 2)),
        (dense_pair, (28, 28, 128), (0, N1, N2, N1 + N2), (0, 1, 2)),
        (igp_dense_block, (28, 28, 128), (0, N1, N1 + INNER), (0, 1, 2)),
        (fractal(2), (56, 56, 53), tuple(i * cost(56, 53, 53) for i in range(3)), (0, 1, 2)),
        (fractal(3), (56, 56, 53), tuple(i * cost(56, 53, 53) for i in range(5)), (0, 1, 2, 3, 4)),
        (fractal(4), (56, 56, 41), tuple(i * cost(56, 41, 41) for i in range(9)), tuple(range(9))),
        (lambda x, unit: unit(unit(x, 8), 16), (9, 9, 4), (cost(9, 4, 8) + cost(9, 8, 16),), (2,)),
    ],
    ids=["ResNet", "Bi-Real", "EBi-Real", "BinaryDenseNet", "IGP-DenseNet", "IGP c2", "IGP c3", "IGP c4", "plain"],
)
def test_blocks_of_the_paper(wire, shape, costs, lengths):
    """With more values asked for than the block has; the first three are the paper's N_1st, N_2nd, N_3rd."""
    assert module_gradient_paths(Block(wire), (2, *shape), count=20) == (costs, lengths)
    assert module_gradient_paths(Block(wire), (1, *shape)) == (costs[:3], lengths[:3])


@pytest.mark.parametrize("width, ratio", [(53, 0.6858), (41, 0.4104), (31, 0.2346)])
def test_a_thinner_igp_block_has_the_cheaper_second_path(width, ratio):
    """At one resolution N'/N = (width / 64)^2."""
    wide = module_gradient_paths(Block(bireal_block), (1, 56, 56, 64)).costs[1]
    thin = module_gradient_paths(FractalBlock(2, conv=CONV), (1, 56, 56, width)).costs[1]
    assert thin / wide == pytest.approx(ratio, abs=5e-5)


@pytest.mark.usefixtures("standard_dtypes")
def test_a_shortcut_by_a_real_convolution_costs_nothing():
    def wire(x, unit):
        shortcut = BinaryConv(128, kernel_size=(1, 1), name="shortcut")(nn.avg_pool(x, (2, 2), strides=(2, 2)))
        return unit(x, 128, stride=2) + BatchNorm(name="shortcut_norm")(shortcut, train=True)

    assert module_gradient_paths(Block(wire), (2, 56, 56, 64)).costs == (0, cost(28, 64, 128))


@pytest.mark.full
def test_igp_resnet69_for_imagenet():
    """Its paths cannot be listed: p(1) = 2, p(C+1) = p(C)^2 + 2 a stage of 5 columns, about 2e25 in four stages."""
    network = igp_resnet69(1000, stem="imagenet", **BINARY)
    graph = path_graph(network, (1, 224, 224, 3))
    unit = cost(56, 31, 31)
    # Half the size and twice the width: each stage's convolutions cost the same.
    assert [convolution.cost for convolution in graph.operations] == [unit] * 4 * 31
    assert len({convolution.path for convolution in graph.operations}) == 4 * 31
    assert graph.operations[0].path == "IGPResNet/stage1_block1/conv"
    assert smallest(graph) == ((0, unit, 2 * unit), (0, 1, 2))
    every = tuple(range(4 * 16 + 1))
    assert smallest(graph, 1000) == (tuple(unit * length for length in every), every)


@pytest.mark.parametrize("network", [bireal18, ebireal18])
def test_bireal_networks(network):
    """The cheapest convolutions widen: half the channels come in."""
    paths = module_gradient_paths(network(1000, **BINARY), (1, 224, 224, 3))
    assert paths == ((0, N // 2, N), (0, 1, 2))


def test_resnet20_has_two_convolutions_a_shortcut():
    n = cost(32, 16, 16)
    paths = module_gradient_paths(resnet20(10, **BINARY), (2, 32, 32, 3))
    assert paths == ((0, n // 2 + n, 2 * n), (0, 2, 4))


def test_igp_dense_block_of_the_networks():
    paths = module_gradient_paths(IGPDenseBlock(32, CONV), (3, 28, 28, 128))
    assert paths == ((0, N1, N1 + INNER), (0, 1, 2))


def test_dense_layers_count_as_convolutions_do():
    layer = BinaryDense(7, **BINARY)
    assert module_gradient_paths(layer, (5, 30)) == ((210,), (1,))
    assert operations(layer, (5, 30)) == (("BinaryDense", 210),)


class OwnBlock(nn.Module):
    """What a user writes: an own estimator, own shortcut, positional `train`, state, more than one output."""

    features: int

    @nn.compact
    def __call__(self, x, train=False):
        triangle = make_sign(lambda x, width: jnp.maximum(0.0, 1.0 - jnp.abs(x) / width))
        own = with_estimator(binary, lambda x: triangle(x, width=2.0))
        y = BinaryConv(self.features, input_quantizer=own, kernel_quantizer=own, name="conv")(nn.silu(x))
        y = nn.BatchNorm(use_running_average=not train)(y)
        gate = nn.sigmoid(nn.Dense(self.features)(y.mean((1, 2))))
        return nn.Dropout(0.5, deterministic=not train)(y * gate[:, None, None]) + nn.Conv(9, (1, 1))(x), {"gate": gate}


@pytest.mark.parametrize("train", [True, False])
def test_own_modules_work_unchanged(train):
    assert module_gradient_paths(OwnBlock(9), (2, 6, 6, 4), train=train) == ((0, cost(6, 4, 9)), (0, 1))


def conv(x, kernel):
    return lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))


def binary_conv(x, kernel):
    ste = make_sign(lambda x: jnp.abs(x) <= 1)
    codes = mark(ste(x), "input_quantizer", values=2)
    kernel = mark(ste(kernel), "kernel_quantizer", values=2)
    return conv(codes, kernel)


X = ShapeDtypeStruct((2, 4, 4, 3), jnp.float32)
KERNELS = {size: np.ones((size, size, 3, 3), np.float32) for size in (1, 2, 3, 5)}
COSTS = {size: 4 * 4 * size * size * 9 for size in KERNELS}


@jax.custom_vjp
def half_chosen(x, y):
    """The derivative by x is true inside, that by y chosen."""
    return x * jnp.sign(y)


half_chosen.defvjp(lambda x, y: (half_chosen(x, y), None), lambda _, g: (g, g))


@jax.custom_vjp
def halved_on_the_way_back(x):
    return x


halved_on_the_way_back.defvjp(lambda x: (x, None), lambda _, g: (g / 2,))


@jax.custom_vjp
def chosen_as_a_whole(x):
    codes = mark(jnp.where(x < 0, -1.0, 1.0), "input_quantizer", values=2)
    kernel = mark(jnp.sign(KERNELS[5]), "kernel_quantizer", values=2)
    return conv(codes, kernel)


chosen_as_a_whole.defvjp(lambda x: (chosen_as_a_whole(x), None), lambda _, g: (g,))


@pytest.mark.parametrize(
    "wire, costs",
    [
        (lambda x, f: halved_on_the_way_back(f(x)), (COSTS[3],)),
        (lambda x, f: f(x) + halved_on_the_way_back(x), (0, COSTS[3])),
        (lambda x, f: chosen_as_a_whole(x), (COSTS[5],)),
        (lambda x, f: chosen_as_a_whole(x + f(x)), (COSTS[5], COSTS[3] + COSTS[5])),
        (lambda x, f: lax.stop_gradient(x) + f(x), (COSTS[3],)),
        (lambda x, f: f(lax.stop_gradient(x)), ()),
        (lambda x, f: jnp.round(x) + jnp.floor(x) + jnp.sign(x) + f(x), (COSTS[3],)),
        (lambda x, f: x.astype(jnp.int32).astype(jnp.float32) + f(x), (COSTS[3],)),
        (lambda x, f: jnp.where(x > 0, 1.0, -1.0) + f(x), (COSTS[3],)),
        (lambda x, f: jnp.where(x > 0, x, 0.0) + f(x), (0, COSTS[3])),
        (lambda x, f: f(x + lax.stop_gradient(jnp.sign(x) - x)), (COSTS[3],)),
        (lambda x, f: mark(jnp.abs(x).mean(), "input_quantizer").reshape(1, 1, 1, 1) * f(x), (COSTS[3],)),
        (lambda x, f: half_chosen(f(x), x), (0, COSTS[3])),
        (lambda x, f: half_chosen(x, f(x)), (0, COSTS[3])),
        (lambda x, f: jax.checkpoint(lambda y: jax.jit(f)(y) + y)(x), (0, COSTS[3])),
        (lambda x, f: lax.cond(x.sum() > 0, f, lambda y: f(f(y)), x), (COSTS[3], 2 * COSTS[3])),
        (lambda x, f: lax.scan(lambda y, _: (f(y), None), x, None, length=4)[0], (4 * COSTS[3],)),
        (lambda x, f: lax.scan(lambda y, _: (y + f(y), y), x, None, length=2)[0], (0, COSTS[3], 2 * COSTS[3])),
        (lambda x, f: f(x), (COSTS[3],)),
        (lambda x, f: jnp.zeros_like(x), ()),
    ],
)
def test_a_path_is_where_a_gradient_passes(wire, costs):
    function = lambda x: wire(x, lambda y: binary_conv(y, KERNELS[3]))
    assert gradient_paths(function, X).costs == costs
    assert gradient_paths(lambda x: (function(x), x), X).costs == costs


def test_a_kernel_made_from_the_activations_is_no_path():
    def function(x):
        return binary_conv(lax.stop_gradient(x), x.mean((0, 1, 2)).reshape(1, 1, 3, 1) * KERNELS[1])

    assert gradient_paths(function, X).costs == ()


def test_the_input_scaling_does_not_count():
    layer = BinaryConv(8, input_scaling=True, **BINARY)
    assert module_gradient_paths(layer, (2, 6, 6, 4)) == ((cost(6, 4, 8),), (1,))
    assert len(operations(layer, (2, 6, 6, 4))) == 1


def test_scanned_layers_count_one_by_one():
    kernels = np.ones((5, 1, 1, 3, 3), np.float32)

    def function(x):
        return lax.scan(lambda y, kernel: (y + binary_conv(y, kernel), None), x, kernels)[0]

    assert gradient_paths(function, X, count=9) == (tuple(COSTS[1] * i for i in range(6)), tuple(range(6)))
    assert len(operations(function, X)) == 5


def random_network(seed):
    """A function of x, and the costs and lengths of all its paths, listed one by one."""
    rng = random.Random(seed)
    steps, paths = [], [[(0, 0)]]
    for _ in range(9):
        kind, sources = rng.choice(["conv", "conv", "add", "cut", "tanh"]), rng.choices(range(len(paths)), k=2)
        size = rng.choice(list(KERNELS))
        steps.append((kind, sources, size))
        first, second = (paths[source] for source in sources)
        paths.append(
            {
                "conv": [(cost + COSTS[size], length + 1) for cost, length in first],
                "add": first + second,
                "cut": second,
                "tanh": first,
            }[kind]
        )

    def function(x):
        values = [x]
        for kind, (i, j), size in steps:
            a, b = values[i], values[j]
            made = {
                "conv": lambda: binary_conv(a, KERNELS[size]),  # noqa: B023
                "add": lambda: a - b,  # noqa: B023
                "cut": lambda: lax.stop_gradient(a) * b,  # noqa: B023
                "tanh": lambda: jnp.tanh(a),  # noqa: B023
            }
            values.append(made[kind]())
        return sum(values)

    return function, [path for of_value in paths for path in of_value]


@pytest.mark.parametrize("seed", range(12))
def test_random_networks_equal_the_list_of_all_paths(seed):
    function, paths = random_network(seed)
    costs, lengths = (tuple(sorted(set(values))) for values in zip(*paths))
    assert gradient_paths(function, X, count=1000) == (costs, lengths)
    assert gradient_paths(function, X, count=4) == (costs[:4], lengths[:4])


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("name", [name for name in ACTIVATION_QUANTIZERS if name != "full_precision"])
def test_every_input_quantizer_is_one_step(name, train):
    """No way past the codes, through a scale or a running average; evaluated, progressive binarization has none."""
    layer = BinaryConv(6, **BINARY | {"input_quantizer": make_quantizer(ACTIVATION_QUANTIZERS, name)})
    blocked = name == "progressive" and not train
    assert module_gradient_paths(layer, (2, 8, 8, 4), train=train) == (
        (cost(8, 4, 6),) * (not blocked),
        (1,) * (not blocked),
    )


@pytest.mark.parametrize("name", [name for name in WEIGHT_QUANTIZERS if name != "full_precision"])
def test_every_kernel_quantizer_is_one_step(name):
    layer = BinaryConv(6, **BINARY | {"kernel_quantizer": make_quantizer(WEIGHT_QUANTIZERS, name)})
    assert module_gradient_paths(layer, (2, 8, 8, 4)) == ((cost(8, 4, 6),), (1,))
    assert {operation.cost for operation in operations(layer, (2, 8, 8, 4))} == {cost(8, 4, 6)}


@pytest.mark.parametrize("real", ["input_quantizer", "kernel_quantizer"])
def test_a_convolution_with_a_real_factor_costs_nothing(real):
    layer = BinaryConv(6, **BINARY | {real: None})
    assert module_gradient_paths(layer, (2, 8, 8, 4)) == ((0,), (0,))
    assert operations(layer, (2, 8, 8, 4)) == ()


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    "function, x, count, message",
    [
        (jnp.tanh, X, 0, r"`count` \(=0\) must be a whole number of at least 1; the paper gives 3"),
        (jnp.tanh, X, 2.5, r"`count` \(=2.5\) must be a whole number of at least 1; the paper gives 3"),
        (jnp.tanh, X, "3", r"`count` \(='3'\) must be a whole number of at least 1; the paper gives 3"),
        (lambda x: x.reshape(x.shape[0], -1), (0, 8), 3, r"`x.shape` \(=\(0, 8\)\) must have one example at least"),
        (jnp.tanh, np.ones((2, 3), np.int32), 3, r"`x` \(of dtype int32\) must be floating point"),
        (lambda x: x > 0, X, 3, r"`the output` \(of dtype bool\) must be floating point"),
        (jnp.tanh, (), 3, r"`x` \(of shape \(\)\) must have the batch as its first axis"),
        (lambda x: None, X, 3, "must return the output activations; it returned no array"),
    ],
)
def test_refused(function, x, count, message):
    with pytest.raises(ValueError, match=message):
        gradient_paths(function, x, count=count)


def test_an_empty_batch_of_a_module_is_refused():
    message = r"`x_shape` \(=\(0, 8, 8, 3\)\) must have one example at least; the batch comes first"
    with pytest.raises(ValueError, match=message):
        module_gradient_paths(CONV(6), (0, 8, 8, 3))
