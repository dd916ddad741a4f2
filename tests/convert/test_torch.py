"""State dicts of PyTorch modules with the published names: the networks here have their logits."""

import itertools
import re
from collections.abc import Callable
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bnn_jax.convert import LAYOUTS, Joined, Negated, from_arrays, from_torch
from bnn_jax.convert.target import describe
from bnn_jax.errors import UsageError
from bnn_jax.layers import BatchNorm, BinaryConvTranspose
from bnn_jax.models.build import build_model
from bnn_jax.outputs import network_logits

SHAPE = (32, 32, 3)
NETWORKS = {
    "bireal": ("bireal18", {"stage_sizes": (2, 3)}),
    "reactnet_resnet": ("reactnet18", {"stage_sizes": (3, 2)}),
    "reactnet_a": ("reactnet_a", {"stage_sizes": (1, 2)}),
    "irnet_resnet20": ("irnet_resnet20", {"stage_sizes": (2, 4, 2)}),
    "irnet_resnet18": ("irnet_resnet18", {"stage_sizes": (2, 4)}),
}
LENET = {"conv1": "conv1", "conv2": "conv2", "dense1": "fc1", "dense2": "fc2", "head": "fc3"}


def images_of():
    """Those of make_goldens.py."""
    return np.random.default_rng(0).normal(size=(3, *SHAPE)).astype(np.float32)


def golden(name):
    with np.load(Path(__file__).parent / "goldens" / f"{name}.npz") as file:
        state = dict(file)
    return state, state.pop("logits")


def network(name):
    settings, options = NETWORKS[name]
    return build_model(settings, num_classes=7, width=2, options=options)


def assert_same(model, variables, logits):
    ours = jax.jit(lambda variables, images: network_logits(model, variables, images))(variables, images_of())
    assert logits.std() > 0.1
    np.testing.assert_allclose(ours, logits, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "name", [n if n == "reactnet_a" else pytest.param(n, marks=pytest.mark.full) for n in NETWORKS]
)
def test_the_logits_are_those_of_the_module(name):
    state, logits = golden(name)
    model = network(name)
    assert_same(model, from_torch(state, model, SHAPE), logits)


@pytest.mark.full
@pytest.mark.parametrize("name", NETWORKS)
def test_a_layout_takes_every_array_exactly_once(name):
    """Also as a checkpoint of DataParallel; each number of the state is in the variables, but those it does not use."""
    state, _ = golden(name)
    model = network(name)
    checkpoint = {"epoch": 3, "state_dict": {f"module.{key}": array for key, array in state.items()}}
    variables = from_torch(checkpoint, model, SHAPE, layout=name)
    kept = [a for key, a in state.items() if not key.startswith("bn3.") and not key.endswith("num_batches_tracked")]
    assert sum(leaf.size for leaf in jax.tree.leaves(variables)) == sum(array.size for array in kept)
    theirs, ours = (
        np.sort(np.abs(np.concatenate([np.ravel(a) for a in arrays]))) for arrays in (kept, jax.tree.leaves(variables))
    )
    np.testing.assert_allclose(ours, theirs, rtol=1e-6)


@pytest.mark.full
def test_another_module_by_a_map_of_names():
    """LeNet: dense kernels behind flattened images change their order; the layers have other names."""
    state, logits = golden("lenet")
    model = build_model("lenet", num_classes=7, width=2)
    assert_same(model, from_torch(state, model, SHAPE, names=LENET), logits)


@pytest.mark.full
def test_flat_and_shaped_kernels_are_the_same():
    state, _ = golden("bireal")
    model = network("bireal")
    shaped = {key.replace(".weights", ".weight"): a for key, a in state.items()}
    unit = "layer2.1.binary_conv.weight"
    shaped[unit] = shaped[unit].reshape(4, 4, 3, 3)
    one, two = (from_torch(s, model, SHAPE, layout="bireal") for s in (state, shaped))
    assert jax.tree.all(jax.tree.map(np.array_equal, one, two))
    kernel = one["params"]["stage2_block1"]["conv2"]["latent_kernel"]
    np.testing.assert_array_equal(kernel.transpose(3, 2, 0, 1), shaped[unit])


@pytest.mark.full
def test_epsilon_goes_into_the_variance():
    state, _ = golden("bireal")
    model = network("bireal")
    variables = from_torch(state, model, SHAPE, epsilon=1e-3)
    found = variables["batch_stats"]["stem_norm"]["var"]
    np.testing.assert_allclose(found + 1e-5, state["bn1.running_var"].astype(np.float64) + 1e-3, rtol=1e-7)


@pytest.mark.parametrize("name", ["lenet", "mnist_mlp"])
def test_a_network_of_no_layout_is_told_to_name_its_parts(name):
    model = build_model(name, num_classes=7, width=4)
    with pytest.raises(UsageError, match=r"^`layout` \(=None\) must be named, or `names` given, for none of .* fits; "):
        from_torch({"fc.weight": np.ones((7, 4), np.float32)}, model, (28, 28, 1))


def test_what_does_not_fit_is_listed():
    state, _ = golden("bireal")
    model = network("bireal")
    changed = state | {"extra.weight": np.ones(3), "fc.weight": np.ones((9, 4), np.float32)}
    del changed["layer1.1.bn1.bias"]
    with pytest.raises(UsageError) as refused:
        from_torch(changed, model, SHAPE, layout="bireal")
    text = str(refused.value)
    assert "missing: layer1.1.bn1.bias;" in text
    assert "unknown: extra.weight;" in text
    assert "of another shape: fc.weight (9, 4) for params/head/kernel (4, 7);" in text
    with pytest.raises(
        UsageError, match=r"for none of bireal, .* fits; bireal is nearest: .*missing: layer1\.1\.bn1\.bias"
    ):
        from_torch(changed, model, SHAPE)
    del state["fc.bias"]
    fresh = from_torch(state, model, SHAPE, fresh=("params/head/*",))
    assert "head" not in fresh["params"]


@pytest.mark.full
def test_numbers_that_are_not_finite_and_kernels_of_another_layout():
    state, _ = golden("bireal")
    model = network("bireal")
    with pytest.raises(UsageError, match=r"not finite: bn1\.weight"):
        from_torch(state | {"bn1.weight": np.full(2, np.nan)}, model, SHAPE, fresh=("params/head/*",))
    with pytest.raises(UsageError, match=r"of another shape: layer1\.0\.binary_conv\.weights"):
        from_torch(state | {"layer1.0.binary_conv.weights": np.ones((3, 3, 2, 2))}, model, SHAPE, fresh=("*/head/*",))


def test_names_that_the_network_does_not_have():
    model = build_model("lenet", num_classes=7, width=2)
    wrong = r"`names` has conv9, which the network does not have; missing: conv1\.weight"
    with pytest.raises(UsageError, match=wrong):
        from_torch({}, model, SHAPE, names={**LENET, "conv9": "conv9"})
    assert isinstance(LAYOUTS["reactnet_a"].modules["first/conv1x1"], Joined)
    assert Negated("x").name == "x"


@pytest.mark.full
@pytest.mark.parametrize("name", NETWORKS)
def test_a_live_module_of_another_seed(name):
    pytest.importorskip("torch", reason="PyTorch is not installed; the goldens were made with it")
    from torch_modules import logits_of, seeded

    module, model = seeded(name, seed=1), network(name)
    assert_same(model, from_torch(module.state_dict(), model, SHAPE), logits_of(module, images_of()))


class Flattening(nn.Module):
    """Two dense layers with as many inputs; one of them alone is behind the flattened image."""

    @nn.compact
    def __call__(self, x):
        x = nn.Conv(8, (3, 3), padding=1, name="conv")(x)
        x = BatchNorm(name="norm")(x.reshape(len(x), -1), train=False)
        return nn.Dense(10, name="fc2")(nn.Dense(128, name="fc1")(nn.relu(x)))


def test_dense_layers_of_the_size_of_a_flattened_image_keep_their_order():
    """In float64: a sum over the window, then products of what PyTorch flattens, channels first."""
    rng = np.random.default_rng(0)
    shapes = {"conv": (8, 2, 3, 3), "fc1": (128, 128), "fc2": (10, 128)}
    state = {f"{name}.weight": rng.normal(size=shape) for name, shape in shapes.items()}
    state |= {f"{name}.bias": rng.normal(size=shape[0]) for name, shape in shapes.items()}
    state |= {f"norm.{name}": rng.uniform(0.5, 2, 128) for name in ("weight", "bias", "running_mean", "running_var")}
    images = rng.normal(size=(3, 4, 4, 2))
    padded = np.pad(images, ((0, 0), (1, 1), (1, 1), (0, 0)))
    windows = np.lib.stride_tricks.sliding_window_view(padded, (3, 3), (1, 2))
    x = np.einsum("nhwcij,ocij->nohw", windows, state["conv.weight"]).reshape(3, 8, 16)
    x = (x + state["conv.bias"][:, None]).reshape(3, 128)
    x = (x - state["norm.running_mean"]) / np.sqrt(state["norm.running_var"] + 1e-5)
    x = np.maximum(x * state["norm.weight"] + state["norm.bias"], 0)
    for name in ("fc1", "fc2"):
        x = x @ state[f"{name}.weight"].T + state[f"{name}.bias"]
    names = {name: name for name in (*shapes, "norm")}
    variables = from_torch(state, Flattening(), (4, 4, 2), names=names)  # the norm's vectors change their order too
    np.testing.assert_allclose(Flattening().apply(variables, jnp.asarray(images, jnp.float32)), x, rtol=1e-3)


class Flattened(nn.Module):
    """A norm and a dense layer behind what a function makes of the images."""

    flatten: Callable[[jax.Array], jax.Array]

    @nn.compact
    def __call__(self, x):
        return nn.Dense(3, use_bias=False, name="fc")(BatchNorm(name="norm")(self.flatten(x), train=False))


def flat(x):
    return x.reshape(len(x), -1)


def first(x):
    """Channels first, as PyTorch's images, flattened."""
    return x.transpose(0, 3, 1, 2).reshape(len(x), -1)


def state_of(inputs):
    rng = np.random.default_rng(0)
    names = ("weight", "bias", "running_mean", "running_var")
    return {f"norm.{n}": rng.uniform(0.5, 2, inputs) for n in names} | {"fc.weight": rng.normal(size=(3, inputs))}


BEHIND = {"norm": "norm", "fc": "fc"}


@pytest.mark.parametrize(
    ("here", "there"),
    [
        (first, first),
        (lambda x: nn.relu(x.transpose(0, 3, 1, 2)).reshape(len(x), -1), lambda x: first(np.maximum(x, 0))),
        (lambda x: flat(nn.relu(x.transpose(0, 3, 1, 2)).transpose(0, 2, 3, 1)), lambda x: first(np.maximum(x, 0))),
        (
            lambda x: jnp.concatenate([flat(x), x.mean((1, 2)), nn.relu(flat(x[:, ::2])), first(x)], -1),
            lambda x: np.concatenate([first(x), x.mean((1, 2)), np.maximum(first(x[:, ::2]), 0), first(x)], -1),
        ),
        (
            lambda x: flat(x) - flat(x).max(-1, keepdims=True) * jnp.ones((1, 40)),
            lambda x: first(x) - first(x).max(-1, keepdims=True),
        ),
        (lambda x: flat(jnp.exp(flat(x)).reshape(x.shape)), lambda x: first(np.exp(x))),
    ],
    ids=["channels first", "relu, channels first", "back again", "joined", "reduced", "unflattened"],
)
def test_flattened_images_of_every_order(here, there):
    """In float64: what PyTorch flattens, channels first, in front of a norm and a product."""
    images = np.random.default_rng(1).normal(size=(3, 4, 5, 2))
    x = there(images)
    state = state_of(x.shape[-1])
    x = (x - state["norm.running_mean"]) / np.sqrt(state["norm.running_var"] + 1e-5)
    x = (x * state["norm.weight"] + state["norm.bias"]) @ state["fc.weight"].T
    variables = from_torch(state, Flattened(here), (4, 5, 2), names=BEHIND)
    found = Flattened(here).apply(variables, jnp.asarray(images, jnp.float32))
    np.testing.assert_allclose(found, x, rtol=1e-3, atol=1e-4)


class Tokens(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = x.reshape(len(x), -1, x.shape[-1])
        return nn.Dense(3, name="fc")(flat(nn.LayerNorm(name="norm")(x + nn.Dense(x.shape[-1], name="mix")(x))))


def test_tokens_are_flattened_as_there():
    """`flatten(2).transpose(1, 2)` there: pixels, then channels."""
    assert describe(Tokens(), (4, 5, 2)).flattened == {}


@pytest.mark.parametrize(
    ("mix", "inputs"),
    [
        (lambda x: flat(x)[:, 1:], 39),
        (lambda x: jnp.pad(flat(x), ((0, 0), (0, 2))), 42),
        (lambda x: jnp.concatenate([flat(x)[:, :9], flat(x)], -1), 49),
        (lambda x: flat(x.transpose(0, 2, 1, 3)), 40),
        (lambda x: flat(x) + first(x), 40),
        (lambda x: first(x) * flat(nn.relu(x)), 40),
    ],
    ids=["slice", "pad", "joined with a slice", "transposed", "of two orders", "of two orders, the other first"],
)
def test_flattened_images_that_are_mixed_are_refused(mix, inputs):
    state = state_of(inputs)
    with pytest.raises(UsageError, match=r"^`model` mixes flattened images in front of 'norm', whose order in PyTorch"):
        from_torch(state, Flattened(mix), (4, 5, 2), names=BEHIND)
    rule = (
        "^`model` mixes flattened images in front of 'fc', whose order in PyTorch is not known; give `from_arrays` the "
    )
    with pytest.raises(UsageError, match=f"{rule}kernel in the order of `model`$"):
        from_torch(state, Flattened(mix), (4, 5, 2), names=BEHIND, fresh="*/norm/*")
    variables = from_torch(state, Flattened(mix), (4, 5, 2), names=BEHIND, fresh=["*/norm/*", "params/fc/*"])
    assert not jax.tree.leaves(variables)


@pytest.mark.parametrize(
    ("weight", "rule"),
    [
        (np.float32(1), r"of another shape: fc\.weight \(\) for params/fc/kernel \(40, 3\)"),
        (np.ones(0), r"of another shape: fc\.weight \(0,\) for params/fc/kernel \(40, 3\)"),
        (np.ones((0, 40)), r"of another shape: fc\.weight \(0, 40\) for params/fc/kernel \(40, 3\)"),
        (np.ones((3, 0)), r"of another shape: fc\.weight \(3, 0\) for params/fc/kernel \(40, 3\)"),
        (np.full((3, 40), "a"), r"not of real numbers: fc\.weight \(<U1\)"),
        (np.full((3, 40), None), r"not of real numbers: fc\.weight \(object\)"),
    ],
)
def test_arrays_that_are_no_kernels_are_refused(weight, rule):
    state = state_of(40) | {"fc.weight": weight}
    with pytest.raises(UsageError, match=f"^the weights do not fit the network; {rule}; give the network's own"):
        from_torch(state, Flattened(flat), (4, 5, 2), names=BEHIND)


def test_keys_that_are_no_names_are_refused():
    rule = "^`state` has the key 0, which is no name; give a mapping name -> array$"
    for state in ({**state_of(40), 0: np.ones(3)}, {"state_dict": {0: np.ones(3)}}):
        with pytest.raises(UsageError, match=rule):
            from_torch(state, Flattened(flat), (4, 5, 2), names=BEHIND)


def test_what_is_no_state_dict_and_no_pattern_is_refused():
    class Module:
        def state_dict(self):
            return state_of(40)

    of_flat = {"model": Flattened(flat), "image_shape": (4, 5, 2), "names": BEHIND}
    with pytest.raises(UsageError, match=r"^`state` is a Module, which has no .*; give `\.state_dict\(\)` of it$"):
        from_torch(Module(), **of_flat)
    with pytest.raises(UsageError, match=r"^`state` is a list, which has no names .*; give a mapping name -> array$"):
        from_torch([1.0], **of_flat)
    with pytest.raises(UsageError, match=r"^`arrays` is a NoneType, which has no names .*; give a mapping name -> a"):
        from_arrays(None, Flattened(flat), (4, 5, 2))
    for argument, patterns in itertools.product(("fresh", "ignored"), (None, 3, [3])):
        rule = rf"^`{argument}` \(={re.escape(repr(patterns))}\) must be a pattern of names or .*; \(\) is none"
        with pytest.raises(UsageError, match=rule):
            from_torch(state_of(40), **of_flat, **{argument: patterns})


def test_one_pattern_is_as_a_list_of_it():
    extended = state_of(40) | {"extra.weight": np.ones(3)}
    one, several = (
        from_torch(extended, Flattened(flat), (4, 5, 2), names=BEHIND, fresh=fresh, ignored=ignored)
        for fresh, ignored in (("params/fc/*", "extra.*"), (["params/fc/*"], ["extra.*"]))
    )
    assert list(one["params"]) == ["norm"]
    assert jax.tree.all(jax.tree.map(np.array_equal, one, several))
    with pytest.raises(UsageError, match=r"network; unknown: extra\.weight; give"):
        from_torch(extended, Flattened(flat), (4, 5, 2), names=BEHIND, ignored="fc.*")
    rule = r"`fresh` has 'fc/\*', which matches no variable; unknown: extra\.weight; give"
    with pytest.raises(UsageError, match=rule):
        from_torch(extended, Flattened(flat), (4, 5, 2), names=BEHIND, fresh="fc/*")


class OneChannel(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.PReLU(name="act")(BatchNorm(name="norm")(x, train=False))


def test_vectors_of_one_number():
    """Norms of grey images, and the one slope that PyTorch's PReLU has as a rule."""
    state = {f"norm.{name}": np.array([2.0]) for name in ("weight", "bias", "running_mean", "running_var")}
    state["act.weight"] = np.array([0.1])
    names = {"norm": "norm", "act/negative_slope": "act.weight"}
    variables = from_torch(state, OneChannel(), (4, 4, 1), names=names)
    x = np.random.default_rng(0).normal(size=(2, 4, 4, 1))
    y = (x - 2) / np.sqrt(2 + 1e-5) * 2 + 2
    found = OneChannel().apply(variables, jnp.asarray(x, jnp.float32))
    np.testing.assert_allclose(found, np.where(y < 0, 0.1 * y, y), rtol=1e-5)


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize(
    "layer",
    [
        lambda size: nn.ConvTranspose(4, (size, size), (2, 2), "VALID", name="up"),
        lambda size: nn.ConvTranspose(4, (size, size), (2, 2), "VALID", transpose_kernel=True, name="up"),
        lambda size: BinaryConvTranspose(4, (size, size), strides=2, padding="VALID", name="up"),
    ],
    ids=["flax", "flax, transposed kernel", "binary"],
)
def test_transposed_convolutions_add_their_windows_as_there(layer, size):
    """Each pixel of PyTorch's adds its window to the output: in float64, for as many inputs as outputs."""
    rng = np.random.default_rng(0)
    weight, images = rng.normal(size=(4, 4, size, size)), rng.normal(size=(2, 3, 3, 4))
    expected = np.zeros((2, 4 + size, 4 + size, 4))
    for i in range(3):
        for j in range(3):
            window = np.einsum("nc,cokl->nklo", images[:, i, j], weight)
            expected[:, 2 * i : 2 * i + size, 2 * j : 2 * j + size] += window

    class Up(nn.Module):
        @nn.compact
        def __call__(self, x):
            return layer(size)(x)

    state = {"up.weight": weight} | ({} if "Binary" in type(layer(size)).__name__ else {"up.bias": np.zeros(4)})
    variables = from_torch(state, Up(), (3, 3, 4), names={"up": "up"})
    np.testing.assert_allclose(Up().apply(variables, jnp.asarray(images, jnp.float32)), expected, rtol=1e-4, atol=1e-5)
    halves = {"a.weight": weight[:, :1], "b.weight": weight[:, 1:]} | {
        name.replace("up", part): x[some]
        for name, x in state.items()
        if name == "up.bias"
        for part, some in (("a", slice(1)), ("b", slice(1, None)))
    }
    joined = from_torch(halves, Up(), (3, 3, 4), names={"up": Joined(("a", "b"))})
    assert jax.tree.all(jax.tree.map(np.array_equal, joined, variables))
