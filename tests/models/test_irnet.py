"""IR-Net's residual networks: published sizes by hand count; a unit against numpy; what a batch norm of zero leaves."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bnn_jax.models.irnet import IRNet, IRUnit, irnet_resnet18, irnet_resnet20, irnet_resnet34
from bnn_jax.models.stem import Stem
from bnn_jax.quantizers import ACTIVATION_QUANTIZERS, WEIGHT_QUANTIZERS

IR = {"input_quantizer": ACTIVATION_QUANTIZERS["ede_sign"](), "kernel_quantizer": WEIGHT_QUANTIZERS["libra_pb"]()}
PLAIN = {"input_quantizer": ACTIVATION_QUANTIZERS["ste_sign"](), "kernel_quantizer": WEIGHT_QUANTIZERS["binary"]()}
REAL = {"input_quantizer": None, "kernel_quantizer": None}


def shapes_of(model, size):
    return jax.eval_shape(lambda: model.init(jax.random.key(0), jnp.zeros((1, size, size, 3)), train=False))["params"]


def leaves_of(params, leaf):
    flat = jax.tree_util.tree_leaves_with_path(params)
    return [int(np.prod(value.shape)) for path, value in flat if path[-1].key == leaf]


def test_resnet20_has_eighteen_binary_layers_and_shortcuts_without_weights():
    params = shapes_of(irnet_resnet20(num_classes=10, **IR), 32)
    latent = leaves_of(params, "latent_kernel")
    assert (len(latent), sum(latent)) == (18, 13_824 + 50_688 + 202_752)
    assert sorted(leaves_of(params, "kernel")) == [3 * 3 * 3 * 16, 64 * 10]
    assert params["norm"]["scale"].shape == (64,)


@pytest.mark.parametrize(
    ("constructor", "layers", "binary", "bits"),
    [(irnet_resnet18, 16, 10_985_472, 33_175_552), (irnet_resnet34, 32, 21_086_208, 43_276_288)],
)
def test_large_networks_have_the_weights_of_the_published_table(constructor, layers, binary, bits):
    """Stem 9408, shortcuts 172,032 and classifier 512,000 weights of 32 bits; the table's 33.1 Mbit are cut off."""
    params = shapes_of(constructor(num_classes=1000, **IR), 224)
    latent, real = leaves_of(params, "latent_kernel"), leaves_of(params, "kernel")
    assert (len(latent), sum(latent)) == (layers, binary)
    assert sum(real) == 9_408 + 172_032 + 512_000
    assert 32 * sum(real) + sum(latent) == bits


@pytest.mark.parametrize("size", [16, 33])
@pytest.mark.parametrize("stem", ["cifar", "imagenet"])
@pytest.mark.parametrize("shortcut", ["pad", "conv"])
def test_stages_halve_images_of_any_size(size, stem, shortcut):
    model = IRNet(num_classes=3, width=4, stem=stem, shortcut=shortcut, stage_sizes=(1, 1, 1), **IR)
    images = jnp.zeros((2, size, size + 1, 3))
    (logits, intermediates), _ = jax.eval_shape(lambda: model.init_with_output(jax.random.key(0), images, train=False))
    sides = [size, size + 1] if stem == "cifar" else [-(-size // 4), -(-(size + 1) // 4)]
    for stage in (1, 2, 3):
        assert intermediates[f"stage{stage}"].shape == (2, *sides, 4 * 2 ** (stage - 1))
        sides = [-(-side // 2) for side in sides]
    assert intermediates["features"].shape == (2, 16)
    assert (logits.shape, logits.dtype) == ((2, 3), jnp.float32)


def random_variables(module, x, **arguments):
    """Variables of normal draws, but positive statistics; no time is lost on compiling the module's own start."""
    shapes = jax.eval_shape(lambda: module.init(jax.random.key(0), x, train=False, **arguments))
    generator = np.random.default_rng(0)
    values = jax.tree.map(lambda leaf: generator.normal(size=leaf.shape).astype(np.float32), shapes)
    return {name: draws if name == "params" else jax.tree.map(np.exp, draws) for name, draws in values.items()}


def correlate(x, kernel, stride):
    """Correlation of NHWC images with a 3x3 HWIO kernel, zero padding 1, by loops over the kernel's taps."""
    rows, columns = ((side - 1) // stride + 1 for side in x.shape[1:3])
    x = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    return sum(
        x[:, i : i + stride * rows : stride, j : j + stride * columns : stride] @ kernel[i, j]
        for i, j in np.ndindex(3, 3)
    )


def normalize(values, name, x):
    stats, affine = values["batch_stats"][name], values["params"][name]
    return (x - stats["mean"]) / np.sqrt(stats["var"] + 1e-5) * affine["scale"] + affine["bias"]


@pytest.mark.parametrize(
    ("stride", "features", "shortcut", "quantizers"),
    [(1, 3, "pad", PLAIN), (2, 6, "pad", PLAIN), (2, 6, "conv", PLAIN), (2, 6, "conv", REAL)],
)
def test_a_unit_equals_numpy(stride, features, shortcut, quantizers):
    unit = IRUnit(features=features, stride=stride, shortcut=shortcut, **quantizers)
    x = np.random.default_rng(1).normal(size=(2, 5, 6, 3)).astype(np.float32)
    variables = random_variables(unit, x, progress=1.0)
    found = jax.jit(lambda: unit.apply(variables, x, train=False, progress=1.0))()

    def sign(values):
        return np.where(values < 0, -1.0, 1.0)

    kernels = variables["params"]["conv"]
    conv = correlate(x, kernels["kernel"], stride) if quantizers is REAL else None
    conv = correlate(sign(x), sign(kernels["latent_kernel"]), stride) if conv is None else conv
    sampled = x[:, ::stride, ::stride]
    if shortcut == "conv":
        added = normalize(variables, "norm_downsample", sampled @ variables["params"]["downsample"]["kernel"][0, 0])
    else:
        added = np.pad(sampled, ((0, 0), (0, 0), (0, 0), (0, features - 3)))
    expected = np.clip(normalize(variables, "norm", conv) + added, -1, 1)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)
    assert 0.05 < (np.abs(expected) == 1).mean() < 0.95


def test_zero_gain_makes_every_unit_its_shortcut():
    model = IRNet(num_classes=3, width=4, stage_sizes=(2, 2), **IR)
    images = np.random.default_rng(2).normal(size=(2, 8, 8, 3)).astype(np.float32)
    variables = random_variables(model, images)
    params = jax.tree_util.tree_map_with_path(
        lambda path, leaf: 0 * leaf if path[0].key.startswith("stage") and path[1].key == "norm" else leaf,
        variables["params"],
    )
    stem = {name: values["stem"] for name, values in variables.items() if "stem" in values}
    start, found = jax.jit(
        lambda: (
            Stem(4, relu=False).apply(stem, images, train=False),
            model.apply(variables | {"params": params}, images, train=False)[1],
        )
    )()
    start = np.clip(start, -1, 1)
    np.testing.assert_allclose(found["stage1"], start, rtol=1e-6)
    np.testing.assert_allclose(found["stage2"][..., :4], start[:, ::2, ::2], rtol=1e-6)
    np.testing.assert_array_equal(found["stage2"][..., 4:], 0)
    assert np.abs(start).max() == 1


def test_the_first_layers_inputs_have_both_signs():
    """The stem ends without ReLU: of the images and of their negatives the first unit makes different things."""
    model = IRNet(num_classes=3, width=4, stage_sizes=(1,), **PLAIN)
    images = np.random.default_rng(3).normal(size=(2, 8, 8, 3)).astype(np.float32)
    variables = random_variables(model, images)
    affine = {"stem": {"norm": {"mean": np.zeros(4, np.float32), "var": np.ones(4, np.float32)}}}
    variables["batch_stats"] |= affine
    variables["params"]["stem"]["norm"] = {"scale": np.full(4, 1e-3, np.float32), "bias": np.zeros(4, np.float32)}
    both = jax.jit(lambda: [model.apply(variables, sign * images, train=False)[1]["stage1"] for sign in (1, -1)])()
    # The stem's outputs are far below 1, so all that can differ by as much is the binary convolution.
    assert float(jnp.abs(both[0] - both[1]).max()) > 0.5


def test_training_in_full_precision_reaches_every_parameter():
    """With binary layers the table of networks is trained, where every parameter of every network moves."""
    model = IRNet(num_classes=3, width=4, stage_sizes=(1, 1), **REAL)
    images = np.random.default_rng(4).normal(size=(4, 8, 8, 3)).astype(np.float32)
    variables = random_variables(model, images)

    def loss(params):
        (logits, _), state = model.apply(
            variables | {"params": params}, images, train=True, progress=0.5, mutable=["batch_stats"]
        )
        return (logits**2 * jnp.arange(3.0)[None]).sum(), (logits, state)

    gradients, (logits, state) = jax.jit(jax.grad(loss, has_aux=True))(variables["params"])
    assert jnp.isfinite(logits).all()
    assert set(state) == {"batch_stats"}
    for path, gradient in jax.tree_util.tree_leaves_with_path(gradients):
        assert jnp.isfinite(gradient).all(), path
        assert jnp.abs(gradient).max() > 0, path


@pytest.mark.parametrize(
    ("text", "arguments"),
    [
        (r"`width` \(=0\) of IRNet must be at least 1", {"width": 0}),
        (r"`stage_sizes` \(=\(3, 0\)\) of IRNet must hold", {"stage_sizes": (3, 0)}),
        (r"`IRNet.shortcut` \(='pool'\) is not known; .* one of: conv, pad", {"shortcut": "pool"}),
    ],
)
def test_refusals(text, arguments):
    with pytest.raises(ValueError, match=text):
        IRNet(**{"num_classes": 10} | arguments)
