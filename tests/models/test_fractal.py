"""IGP-ResNets: published storage and convolutions a stage, the fractal join against numpy and in closed form."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bnn_jax.models.fractal import FractalBlock, IGPResNet, igp_resnet21, igp_resnet37, igp_resnet41, igp_resnet69
from bnn_jax.quantizers import ACTIVATION_QUANTIZERS, WEIGHT_QUANTIZERS

BINARY = {
    "input_quantizer": ACTIVATION_QUANTIZERS["ste_sign"](),
    "kernel_quantizer": WEIGHT_QUANTIZERS["binary"](),
}


def parameters_of(model, side=224):
    return jax.eval_shape(lambda: model.init(jax.random.key(0), jnp.zeros((1, side, side, 3)), train=False))["params"]


def leaves(params):
    return [([entry.key for entry in path], leaf.shape) for path, leaf in jax.tree_util.tree_leaves_with_path(params)]


def size(params, name):
    return sum(int(np.prod(shape)) for path, shape in leaves(params) if path[-1] == name)


@pytest.mark.parametrize(
    ("network", "convolutions", "with_bias", "without_bias"),
    [
        (igp_resnet21, (7, 7, 7, 7), "32.667", "32.635"),
        (igp_resnet37, (15, 15, 15, 15), "32.270", "32.238"),
        (igp_resnet41, (14, 14, 21, 14), "42.641", "42.609"),
        (igp_resnet69, (31, 31, 31, 31), "32.196", "32.164"),
    ],
)
def test_storage_and_convolutions(network, convolutions, with_bias, without_bias):
    """Zhu et al. print 32.2 Mbit for IGP-ResNet37(41) and 42.6 for IGP-ResNet41(48), without the dense layer's bias."""
    params = parameters_of(network(num_classes=1000, stem="imagenet", **BINARY))
    paths = [path for path, _ in leaves(params) if path[-1] == "latent_kernel"]
    assert tuple(sum(path[0].startswith(f"stage{stage}_") for path in paths) for stage in (1, 2, 3, 4)) == convolutions
    bits = 32 * size(params, "kernel") + size(params, "latent_kernel")
    assert f"{(bits + 32 * 1000) / 1e6:.3f}" == with_bias
    assert f"{bits / 1e6:.3f}" == without_bias


def test_full_precision_layers():
    params = parameters_of(igp_resnet21(num_classes=10, stem="cifar", **BINARY), 32)
    layers = {tuple(path[:-1]) for path, _ in leaves(params) if path[-1] == "kernel"}
    widen = {(f"stage{stage}_widen",) for stage in (2, 3, 4)}
    assert layers == {("stem", "conv"), ("head",)} | widen
    assert size(parameters_of(igp_resnet21(num_classes=10, stem="cifar"), 32), "latent_kernel") == 0


def test_three_stages_for_small_images():
    model = IGPResNet(num_classes=10, width=6, columns=(2, 1, 3), depths=(4, 3, 4), **BINARY)
    images = jnp.zeros((2, 32, 32, 3))
    (logits, intermediates), _ = jax.eval_shape(lambda: model.init_with_output(jax.random.key(0), images, train=False))
    shapes = {name: value.shape for name, value in intermediates.items()}
    assert shapes == {"stage1": (2, 32, 32, 6), "stage2": (2, 16, 16, 12), "stage3": (2, 8, 8, 24), "features": (2, 24)}
    assert logits.shape == (2, 10)


def random_variables(model, *inputs, seed=0):
    """Parameters and statistics drawn at random, where zero biases would hide what depends on them."""
    rng = np.random.default_rng(seed)
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), *inputs, train=False))

    def draw(path, leaf):
        value = 0.3 * rng.normal(size=leaf.shape)
        return jnp.asarray(np.abs(value) + 0.5 if path[-1].key == "var" else value, jnp.float32)

    return jax.tree_util.tree_map_with_path(draw, shapes)


INPUTS = jnp.asarray(np.random.default_rng(0).normal(size=(2, 5, 5, 3)), jnp.float32)


@pytest.mark.parametrize(
    ("join", "columns", "gain"), [("mean", 1, 1), ("mean", 3, 1), ("sum", 1, 1), ("sum", 2, 2), ("sum", 3, 5)]
)
def test_the_identity_path_has_the_gain_of_the_join(join, columns, gain):
    """With batch norms of scale and bias zero only the shortcuts are left."""
    block = FractalBlock(columns, join=join, **BINARY)
    zeroed = jax.tree_util.tree_map_with_path(
        lambda path, leaf: jnp.zeros_like(leaf) if path[-1].key in ("scale", "bias") else leaf,
        random_variables(block, INPUTS),
    )
    np.testing.assert_allclose(block.apply(zeroed, INPUTS, train=False), gain * INPUTS, rtol=1e-6)


def unit(x, variables, *path):
    """x + BN(conv3x3(sign x)) by loops over taps, with the parameters found under `path`."""
    params, statistics = variables["params"], variables["batch_stats"]
    for name in path:
        params, statistics = params[name], statistics[name]
    padded = np.pad(np.where(x < 0, -1.0, 1.0), ((0, 0), (1, 1), (1, 1), (0, 0)))
    kernel = np.where(params["conv"]["latent_kernel"] < 0, -1.0, 1.0)
    height, width = x.shape[1:3]
    y = sum(padded[:, i : i + height, j : j + width] @ kernel[i, j] for i, j in np.ndindex(3, 3))
    mean, variance = statistics["norm"]["mean"], statistics["norm"]["var"]
    return x + params["norm"]["scale"] * (y - mean) / np.sqrt(variance + 1e-5) + params["norm"]["bias"]


@pytest.mark.parametrize(("join", "weight"), [("mean", 0.5), ("sum", 1.0)])
def test_three_columns_equal_their_composition(join, weight):
    block = FractalBlock(3, join=join, **BINARY)
    variables = random_variables(block, INPUTS, seed=1)
    found = block.apply(variables, INPUTS, train=False)
    v = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), variables)

    def two_columns(y, name):
        long = unit(unit(y, v, name, "first"), v, name, "second")
        return weight * (long + unit(y, v, name))

    x = np.asarray(INPUTS, np.float64)
    expected = weight * (two_columns(two_columns(x, "first"), "second") + unit(x, v))
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)


def parameters_without_gradient(model):
    images = jnp.asarray(np.random.default_rng(3).normal(size=(4, 8, 8, 3)), jnp.float32)
    variables = random_variables(model, images)

    def loss(params):
        (logits, _), _ = model.apply(variables | {"params": params}, images, train=True, mutable=["batch_stats"])
        return -jax.nn.log_softmax(logits)[:, 0].sum(), logits

    gradients, logits = jax.jit(jax.grad(loss, has_aux=True))(variables["params"])
    assert logits.shape == (4, 5)
    assert jnp.isfinite(logits).all()
    found = jax.tree_util.tree_leaves_with_path(gradients)
    return {"/".join(entry.key for entry in path) for path, leaf in found if abs(leaf).max() < 1e-5}


def test_the_gradient_reaches_every_parameter():
    """But the last shifts of the first stage, which the batch norm of the second takes out again."""
    model = IGPResNet(num_classes=5, width=4, columns=(2, 1), depths=(2, 1), **BINARY)
    without = {"stage1_block1/norm/bias", "stage1_block1/second/norm/bias"}
    assert parameters_without_gradient(model) == without


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"width": 0}, r"`width` \(=0\) of IGPResNet must be at least 1; 53 is usual"),
        ({"join": "max"}, r"`join` \(='max'\) of IGPResNet must be mean or sum; mean keeps shortcuts at gain 1"),
        ({"columns": ()}, r"`columns` \(=\(\)\) of IGPResNet must be at least 1 for each of one or more stages"),
        ({"columns": (3, 0)}, r"`columns` \(=\(3, 0\)\) of IGPResNet must be at least 1"),
        ({"columns": (3,), "depths": (4, 4)}, r"`depths` \(=\(4, 4\)\) of IGPResNet must give one depth for each of"),
        (
            {"columns": (3, 2), "depths": (6, 0)},
            r"`depths` \(=\(6, 0\)\) of IGPResNet must be positive multiples of 2\^\(columns - 1\), here \(4, 2\); "
            r"take \(8, 2\)",
        ),
    ],
)
def test_networks_that_cannot_be_built(options, message):
    with pytest.raises(ValueError, match=message):
        IGPResNet(num_classes=10, **options)


def test_images_too_small():
    message = r"`images` \(of 4x4\) are too small for 4 stages of IGPResNet with the cifar stem; use larger ones or"
    with pytest.raises(ValueError, match=message):
        parameters_of(igp_resnet21(num_classes=10, stem="cifar"), 4)
    with pytest.raises(ValueError, match=r"`stem` \(='large'\) must be cifar"):
        parameters_of(igp_resnet21(num_classes=10, stem="large"), 32)
