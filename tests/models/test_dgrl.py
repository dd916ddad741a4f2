"""DGRL: sizes by hand count, the unit's parts one by one, shapes, errors."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bnn_jax.models.dgrl import DgrlUnit, SqueezeInteraction, dgrl_resnet18
from bnn_jax.quantizers import ACTIVATION_QUANTIZERS, WEIGHT_QUANTIZERS

BI_REAL = {
    "input_quantizer": ACTIVATION_QUANTIZERS["approx_sign"](),
    "kernel_quantizer": WEIGHT_QUANTIZERS["magnitude_aware"](),
}


def filled(init):
    """Random variables of the shapes that `init` makes: kernels of both signs, the rest positive."""
    rng = np.random.default_rng(0)
    draw = lambda shape: rng.normal(size=shape) if len(shape) in (2, 4) else rng.uniform(0.3, 1.5, shape)
    return jax.tree.map(lambda leaf: jnp.asarray(draw(leaf.shape), jnp.float32), jax.eval_shape(init))


def shapes_of(model, size):
    return jax.eval_shape(lambda: model.init(jax.random.key(0), jnp.zeros((1, size, size, 3)), train=False))


def count(tree, *names):
    """Elements of the leaves whose path holds every name."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return sum(value.size for path, value in leaves if set(names) <= {key.key for key in path})


def test_sizes_by_hand_count():
    """A branch C -> F holds C^2/4 + 9 C^2/16 + C F/4 weights: 11 % of the binary ones, by the paper about 10 %."""
    params = shapes_of(dgrl_resnet18(num_classes=1000, stem="imagenet", **BI_REAL), 224)["params"]
    assert count(params, "latent_kernel") == 10_985_472
    branch = lambda c, f: c * c // 4 + 9 * c * c // 16 + c * f // 4
    transitions = sum(branch(c, 2 * c) for c in (64, 128, 256))
    expected = 4 * branch(64, 64) + transitions + 3 * sum(branch(c, c) for c in (128, 256, 512))
    assert count(params, "branch", "kernel") == expected == 1_227_008
    assert count(params, "kernel") == 9408 + 172_032 + 512_000 + expected
    assert 0.10 < expected / 10_985_472 < 0.12


def convolve(x, kernel, stride, padding):
    x = np.pad(x, ((0, 0), (padding, padding), (padding, padding), (0, 0)))
    rows, columns = ((n - k) // stride + 1 for n, k in zip(x.shape[1:3], kernel.shape))
    taps = np.ndindex(*kernel.shape[:2])
    return sum(
        x[:, i : i + stride * (rows - 1) + 1 : stride, j : j + stride * (columns - 1) + 1 : stride] @ kernel[i, j]
        for i, j in taps
    )


def normalize(x, params, stats):
    return params["scale"] * (x - stats["mean"]) / np.sqrt(stats["var"] + 1e-5) + params["bias"]


@pytest.mark.parametrize(("features", "stride"), [(4, 1), (8, 2)])
def test_the_branch_equals_numpy(features, stride):
    x = jnp.asarray(np.random.default_rng(1).normal(size=(2, 6, 4, 4)), jnp.float32)
    branch = SqueezeInteraction(features, stride, reduction=2)
    variables = filled(lambda: branch.init(jax.random.key(0), x, train=False))
    exact = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), variables)
    params, stats, y = exact["params"], exact["batch_stats"], np.asarray(x, np.float64)
    for name, strides, padding in (("squeeze", 1, 0), ("interact", stride, 1), ("expand", 1, 0)):
        y = convolve(y, params[name]["kernel"], strides, padding)
        y = normalize(y, params[f"{name}_norm"], stats[f"{name}_norm"])
        y = y if name == "expand" else np.maximum(y, 0)
    found = jax.jit(lambda: branch.apply(variables, x, train=False))()
    np.testing.assert_allclose(found, y, rtol=1e-3, atol=1e-3)


def silenced(variables, *path):
    """`variables` with the gamma and beta of the norm at `path` zero."""
    *parents, last = path
    tree = variables = jax.tree.map(lambda leaf: leaf, variables)
    for parent in ("params", *parents):
        tree = tree[parent]
    tree[last] = jax.tree.map(jnp.zeros_like, tree[last])
    return variables


@pytest.mark.parametrize("quantizers", [BI_REAL, dict.fromkeys(BI_REAL)], ids=["binary", "real"])
def test_the_unit_is_the_sum_of_its_parts(quantizers):
    x = jnp.asarray(np.random.default_rng(1).normal(size=(2, 4, 4, 4)), jnp.float32)
    unit = DgrlUnit(4, 1, 2, **quantizers)
    variables = filled(lambda: unit.init(jax.random.key(0), x, train=False, progress=0.0))
    apply = jax.jit(lambda variables: unit.apply(variables, x, train=False, progress=0.0))
    no_branch = silenced(variables, "branch", "expand_norm")
    no_conv = silenced(variables, "norm")
    np.testing.assert_array_equal(apply(silenced(no_branch, "norm")), x)
    branch = {name: tree["branch"] for name, tree in variables.items()}
    expected = jax.jit(lambda: SqueezeInteraction(4, 1, 2).apply(branch, x, train=False))() + x
    np.testing.assert_allclose(apply(no_conv), expected, rtol=1e-4, atol=1e-4)

    exact = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), variables)
    codes, values = np.where(np.asarray(x) < 0, -1.0, 1.0), np.maximum(np.asarray(x, np.float64), 0)
    if quantizers is BI_REAL:
        kernel = exact["params"]["conv"]["latent_kernel"]
        kernel = np.where(kernel < 0, -1.0, 1.0) * np.abs(kernel).mean((0, 1, 2))
        y = convolve(codes, kernel, 1, 1)
    else:
        y = convolve(values, exact["params"]["conv"]["kernel"], 1, 1)
    expected = normalize(y, exact["params"]["norm"], exact["batch_stats"]["norm"]) + np.asarray(x)
    np.testing.assert_allclose(apply(no_branch), expected, rtol=1e-4, atol=1e-4)


def test_shapes_of_a_small_network():
    model = dgrl_resnet18(num_classes=3, width=4, stage_sizes=(1, 1), stem="cifar", reduction=2, **BI_REAL)
    images = jnp.zeros((2, 8, 8, 3))
    (logits, intermediates), _ = jax.eval_shape(lambda: model.init_with_output(jax.random.key(0), images, train=False))
    assert logits.shape == (2, 3) and logits.dtype == jnp.float32
    shapes = {name: value.shape for name, value in intermediates.items()}
    units = {"stage1_unit1": (2, 8, 8, 4), "stage2_unit1": (2, 4, 4, 8)}
    assert shapes == units | {"stage1": (2, 8, 8, 4), "stage2": (2, 4, 4, 8), "features": (2, 8)}


def test_errors():
    message = (
        r"`reduction` \(=4\) leaves a branch with no channels of the 3 inputs of layer 'stage1_unit1/branch'; "
        r"it must be at most 3"
    )
    with pytest.raises(ValueError, match=message):
        shapes_of(dgrl_resnet18(num_classes=3, width=3), 8)
    with pytest.raises(ValueError, match=r"`reduction` \(=0\) must be positive in layer 'branch'; 4 is usual"):
        shapes_of(dgrl_resnet18(num_classes=3, reduction=0), 8)
