"""Files of Keras with a network as larq's BinaryNet: the network here has its logits, whichever form they have."""

from pathlib import Path

import flax.linen as nn
import jax
import numpy as np
import pytest
from networks import random_variables

from bnn_jax.convert import from_keras
from bnn_jax.errors import UsageError
from bnn_jax.layers import BatchNorm
from bnn_jax.models.build import build_model
from bnn_jax.outputs import network_logits

h5py = pytest.importorskip("h5py", reason="h5py, of the extra keras, is not installed")
GOLDENS = Path(__file__).parent / "goldens"
SHAPE = (8, 8, 3)
MODEL = build_model("bnn_convnet", num_classes=7, width=4, options={"stage_sizes": (1, 1), "dense_layers": 1})


def as_keras_2(path):
    """The same weights as `model.save_weights` of Keras 2, of which larq's zoo is: ":0", and no config."""
    with h5py.File(GOLDENS / "binarynet.h5") as new, h5py.File(path, "w") as old:
        weights = new["model_weights"]
        names = [name for name in weights.attrs["layer_names"] if weights[name].attrs["weight_names"].size]
        old.attrs["layer_names"] = [name.encode() for name in names]
        for name in names:
            group, group_of_new = old.create_group(name), weights[name]
            arrays = {f"{name}/{w.split('/')[-1]}:0": group_of_new[w][()] for w in group_of_new.attrs["weight_names"]}
            group.attrs["weight_names"] = [w.encode() for w in arrays]
            for weight, array in arrays.items():
                group[weight] = array
    return path


def as_numbers(path):
    """The same weights in the form of .weights.h5, as `model.save_weights` of Keras 3 writes them."""
    with h5py.File(GOLDENS / "binarynet.h5") as old, h5py.File(path, "w") as new:
        for name in old["model_weights"].attrs["layer_names"]:
            group = old["model_weights"][name]
            variables = new.create_group(f"layers/{name}/vars")
            for number, weight in enumerate(group.attrs["weight_names"]):
                variables[str(number)] = group[weight][()]
    return path


def legacy(path, layers):
    """A file in the form of Keras 2 with layers: name -> name of a weight -> array."""
    with h5py.File(path, "w") as file:
        for layer, arrays in layers.items():
            for name, array in arrays.items():
                file[f"{layer}/{layer}/{name}:0"] = array
            file[layer].attrs["weight_names"] = [f"{layer}/{name}:0".encode() for name in arrays]
        file.attrs["layer_names"] = [layer.encode() for layer in layers]
    return path


@pytest.fixture(scope="module")
def converted():
    return from_keras(GOLDENS / "binarynet.h5", MODEL, SHAPE)


def test_the_logits_are_those_of_keras(converted):
    images = np.random.default_rng(0).normal(size=(3, *SHAPE)).astype(np.float32)
    with np.load(GOLDENS / "binarynet.npz") as file:
        logits = file["logits"]
    ours = jax.jit(lambda variables, images: network_logits(MODEL, variables, images))(converted, images)
    assert logits.std() > 1
    np.testing.assert_allclose(ours, logits, rtol=1e-5, atol=1e-5)


def test_every_form_of_the_file_has_the_same_weights(converted, tmp_path):
    """Without the model's config the last norm, which has an epsilon of its own, needs it said."""
    for path in (as_numbers(tmp_path / "new.weights.h5"), as_keras_2(tmp_path / "old.h5")):
        found = from_keras(path, MODEL, SHAPE)
        last = found["batch_stats"]["head_norm"]["var"]
        np.testing.assert_allclose(last + 1e-3, converted["batch_stats"]["head_norm"]["var"], rtol=1e-6)
        found["batch_stats"]["head_norm"]["var"] = converted["batch_stats"]["head_norm"]["var"]
        assert jax.tree.all(jax.tree.map(np.array_equal, found, converted))
    scale = converted["params"]["norm1"]["scale"]
    np.testing.assert_array_equal(scale, np.ones(4))
    assert converted["params"]["norm2"]["scale"].std() > 0


QUICKNET = build_model("quicknet", num_classes=7, width=8, options={"stage_sizes": (1, 1)})
EPSILONS = {"batch_normalization": 1e-3, "batch_normalization_[12]": 1e-3, "*": 1e-5}
IN_ORDER = {"branches": "in_order", "ignored": ["depthwise_conv2d*"]}
BI_REAL = build_model("bireal18", num_classes=7, width=2, options={"stage_sizes": (1, 2), "same_padding": True})


@pytest.mark.full
@pytest.mark.parametrize(
    ("name", "model", "side", "options"),
    [
        ("quicknet", QUICKNET, 16, {"epsilon": EPSILONS, **IN_ORDER}),
        ("bireal_same", BI_REAL, 32, {"branches": "shortcut_first"}),
    ],
)
def test_networks_with_branches_whose_order_is_told(name, model, side, options):
    """QuickNet: convolutions without quantizers that larq names so, depthwise kernels, epsilons of two kinds.

    Bi-Real Net: shortcuts that are made first, strided windows that are padded at the end.
    """
    shape = (side, side, 3)
    variables = from_keras(GOLDENS / f"{name}.weights.h5", model, shape, **options)
    images = np.random.default_rng(0).normal(size=(3, *shape)).astype(np.float32)
    with np.load(GOLDENS / f"{name}.npz") as file:
        logits = file["logits"]
    ours = jax.jit(lambda variables, images: network_logits(model, variables, images))(variables, images)
    assert logits.std() > 0.1
    np.testing.assert_allclose(ours, logits, rtol=1e-5, atol=1e-5)


@pytest.mark.full
def test_an_epsilon_for_each_norm_and_an_order_that_is_known():
    path = GOLDENS / "quicknet.weights.h5"
    with pytest.raises(UsageError, match=r"`epsilon` \(={'x': 0.1}\) has none for batch_norm.*; add one for '\*'"):
        from_keras(path, QUICKNET, (16, 16, 3), epsilon={"x": 0.1}, **IN_ORDER)
    with pytest.raises(UsageError, match=r"`branches` \(='first'\) must be in_order or shortcut_first"):
        from_keras(path, QUICKNET, (16, 16, 3), branches="first")


@pytest.mark.full
def test_one_by_one_convolutions_of_a_flattened_image_are_dense_layers(tmp_path):
    """BinaryAlexNet of larq's zoo; its batch norms have no scale."""
    model = build_model("binary_alexnet", num_classes=5, width=2)
    variables = random_variables(model, (64, 64, 3))
    order = ("conv1", "conv2", "conv3", "conv4", "conv5", "dense6", "dense7", "head")
    layers = {}
    for number, layer in enumerate(order):
        kernel = variables["params"][layer]["latent_kernel"]
        layers[f"quant_conv2d_{number + 3}"] = {"kernel": kernel if kernel.ndim == 4 else kernel[None, None]}
        norm = "head_norm" if layer == "head" else f"norm{layer[-1]}"
        statistics = variables["batch_stats"][norm]
        arrays = {"beta": variables["params"][norm]["bias"], "moving_mean": statistics["mean"]}
        layers[f"batch_normalization_{number + 8}"] = arrays | {"moving_variance": statistics["var"]}
    found = from_keras(legacy(tmp_path / "net.h5", layers), model, (64, 64, 3), epsilon=1e-5)
    assert jax.tree.all(jax.tree.map(np.array_equal, found, variables))


def test_what_does_not_fit_is_listed(tmp_path):
    path = as_keras_2(tmp_path / "old.h5")
    deeper = build_model("bnn_convnet", num_classes=7, width=4, options={"stage_sizes": (2, 1), "dense_layers": 1})
    with pytest.raises(UsageError) as refused:
        from_keras(path, deeper, SHAPE)
    text = str(refused.value)
    assert "not known where to find: batch_stats/head_norm/mean, batch_stats/head_norm/var, params/conv3/latent" in text
    assert "quant_conv2d_1/kernel (3, 3, 4, 8) for params/conv2/latent_kernel (3, 3, 4, 4)" in text
    with pytest.raises(
        UsageError, match=r"has conv9, which the network does not have; .* unknown: .*, quant_dense_1/kernel; "
    ):
        from_keras(path, MODEL, SHAPE, names={"conv9": "quant_conv2d"})


@pytest.mark.full
def test_branches_need_names():
    model = build_model("bireal_resnet20", num_classes=7, width=4, options={"stage_sizes": (1,)})
    with pytest.raises(UsageError, match=r"`names` \(=None\) must say which layer is which, .* for branches"):
        from_keras(GOLDENS / "binarynet.h5", model, SHAPE)


@pytest.mark.parametrize(("written", "rule"), [(b"text", "is no HDF5 file"), (None, "is not a file")])
def test_other_files_are_refused(tmp_path, written, rule):
    path = tmp_path / "x.h5"
    if written is not None:
        path.write_bytes(written)
    with pytest.raises(UsageError, match=rule):
        from_keras(path, MODEL, SHAPE)


def test_a_file_without_layers(tmp_path):
    with h5py.File(tmp_path / "x.h5", "w") as file:
        file["numbers"] = np.ones(3)
    with pytest.raises(UsageError, match=r"holds no layers of Keras's, but numbers; save them: model\.save_weights"):
        from_keras(tmp_path / "x.h5", MODEL, SHAPE)


class Normed(nn.Module):
    """A dense layer and a batch norm that has a scale, a bias, or both."""

    use_scale: bool
    use_bias: bool

    @nn.compact
    def __call__(self, x):
        x = nn.Dense(3, use_bias=False, name="dense")(x.reshape(len(x), -1))
        return BatchNorm(use_scale=self.use_scale, use_bias=self.use_bias, name="norm")(x, train=False)


def test_three_vectors_of_a_norm_are_what_the_network_has(tmp_path):
    """The file says nothing of what was left out: gamma where the norm here has no bias, else beta."""
    path, vectors = tmp_path / "three.weights.h5", np.arange(9, dtype=np.float32).reshape(3, 3) + 1
    with h5py.File(path, "w") as file:
        file["layers/dense/vars/0"] = np.ones((4, 3), np.float32)
        for number, vector in enumerate(vectors):
            file[f"layers/batch_normalization/vars/{number}"] = vector
    for use_scale, use_bias, own in ((True, False, "scale"), (False, True, "bias")):
        found = from_keras(path, Normed(use_scale, use_bias), (2, 2, 1), epsilon=1e-5)
        np.testing.assert_array_equal(found["params"]["norm"][own], vectors[0])
        np.testing.assert_array_equal(found["batch_stats"]["norm"]["mean"], vectors[1])


def test_transposed_convolutions_are_refused(tmp_path):
    path = tmp_path / "up.weights.h5"
    with h5py.File(path, "w") as file:
        file["layers/conv2d_transpose/vars/0"] = np.ones((2, 2, 3, 3), np.float32)
    up = nn.Sequential([nn.ConvTranspose(3, (2, 2), use_bias=False)])
    with pytest.raises(UsageError, match=r"^`path` \(=.*\) is not read for networks with transposed convolutions, as"):
        from_keras(path, up, (2, 2, 3))


class Grouped(nn.Module):
    """A convolution in groups, and one of all channels."""

    groups: int
    features: int

    @nn.compact
    def __call__(self, x):
        x = nn.Conv(self.features, (3, 3), padding="VALID", feature_group_count=self.groups, name="grouped")(x)
        return nn.Conv(2, (1, 1), use_bias=False, name="whole")(x)


def grouped_arrays(kernel, features):
    rng = np.random.default_rng(0)
    whole = {"kernel": rng.normal(size=(1, 1, features, 2)).astype(np.float32)}
    return {**kernel, "bias": rng.normal(size=features).astype(np.float32)}, whole


def windows_of(images):
    return np.lib.stride_tricks.sliding_window_view(images, (3, 3), (1, 2))


@pytest.mark.parametrize("groups", [2, 4])
@pytest.mark.parametrize("given", [None, {"grouped": "conv2d", "whole": "conv2d_1"}], ids=["in order", "named"])
def test_a_convolution_in_groups_is_that_of_keras(tmp_path, given, groups):
    """Each group of its filters, one behind the other, sees its group of channels alone: four are a channel each."""
    rng = np.random.default_rng(1)
    inputs = 4 // groups
    images, kernel = rng.normal(size=(2, 5, 5, 4)), rng.normal(size=(3, 3, inputs, 3 * groups)).astype(np.float32)
    grouped, whole = grouped_arrays({"kernel": kernel}, 3 * groups)
    parts = [
        np.einsum(
            "nhwcij,ijco->nhwo",
            windows_of(images[..., inputs * g : inputs * (g + 1)]),
            kernel[..., 3 * g : 3 * g + 3],
        )
        for g in range(groups)
    ]
    expected = (np.concatenate(parts, -1) + grouped["bias"]) @ whole["kernel"][0, 0]
    path = legacy(tmp_path / "groups.h5", {"conv2d": grouped, "conv2d_1": whole})
    model = Grouped(groups=groups, features=3 * groups)
    variables = from_keras(path, model, (5, 5, 4), names=given)
    np.testing.assert_allclose(model.apply(variables, images.astype(np.float32)), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("multiple", [1, 2])
@pytest.mark.parametrize("given", [None, {"grouped": "depthwise_conv2d", "whole": "conv2d"}], ids=["in order", "named"])
def test_a_depthwise_convolution_is_that_of_keras(tmp_path, multiple, given):
    """Keras has the multiples of a channel side by side."""
    rng = np.random.default_rng(1)
    images, kernel = rng.normal(size=(2, 5, 5, 4)), rng.normal(size=(3, 3, 4, multiple)).astype(np.float32)
    depthwise, whole = grouped_arrays({"depthwise_kernel": kernel}, 4 * multiple)
    expected = np.einsum("nhwcij,ijcm->nhwcm", windows_of(images), kernel).reshape(2, 3, 3, -1)
    expected = (expected + depthwise["bias"]) @ whole["kernel"][0, 0]
    path = legacy(tmp_path / "depthwise.h5", {"depthwise_conv2d": depthwise, "conv2d": whole})
    model = Grouped(groups=4, features=4 * multiple)
    variables = from_keras(path, model, (5, 5, 4), names=given)
    np.testing.assert_allclose(model.apply(variables, images.astype(np.float32)), expected, rtol=1e-4, atol=1e-4)


def test_kernels_of_other_groups_are_refused(tmp_path):
    """As many numbers as in the kernel here: an ordinary one, and a depthwise one of more inputs."""
    names = {"grouped": "theirs", "whole": "conv2d"}
    for name, features, kernel in (
        ("kernel", 4, np.ones((3, 3, 4, 1), np.float32)),
        ("depthwise_kernel", 8, np.ones((3, 3, 8, 1), np.float32)),
    ):
        theirs, whole = grouped_arrays({name: kernel}, features)
        path = legacy(tmp_path / "other.h5", {"theirs": theirs, "conv2d": whole})
        shapes = rf"theirs/{name} \(3, 3, {features}, 1\) for params/grouped/kernel \(3, 3, 1, {features}\)"
        with pytest.raises(UsageError, match=f"network; of another shape: {shapes}; give"):
            from_keras(path, Grouped(groups=4, features=features), (5, 5, 4), names=names)


def test_a_layer_that_is_a_model_is_refused(tmp_path):
    kernel = np.ones((4, 3), np.float32)
    layers = {"backbone": {"conv1/kernel": kernel, "conv2/kernel": kernel}, "dense": {"kernel": kernel}}
    path, model = legacy(tmp_path / "nested.h5", layers), nn.Sequential([nn.Dense(3, use_bias=False)])
    rule = "^`path` has the layer 'backbone', which holds a model of its own; save its weights alone$"
    with pytest.raises(UsageError, match=rule):
        from_keras(path, model, (1, 1, 4))
    found = from_keras(path, model, (1, 1, 4), ignored="back*")
    np.testing.assert_array_equal(found["params"]["layers_0"]["kernel"], kernel)


def test_one_pattern_is_as_a_list_of_it(tmp_path):
    path = as_keras_2(tmp_path / "old.h5")
    options = ({"fresh": f("*/head*"), "ignored": f("quant_dense_1")} for f in (str, lambda pattern: [pattern]))
    one, several = (from_keras(path, MODEL, SHAPE, **given) for given in options)
    assert sorted(one["params"]) == ["conv1", "conv2", "dense1", "dense_norm1", "norm1", "norm2"]
    assert jax.tree.all(jax.tree.map(np.array_equal, one, several))
    with pytest.raises(UsageError, match=r"; `fresh` has 'head/\*', which matches no variable; give"):
        from_keras(path, MODEL, SHAPE, fresh="head/*")
