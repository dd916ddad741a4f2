"""The table of networks: complete, its published quantizers, and the laws that every network keeps."""

import inspect
from functools import lru_cache, partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from networks import SIGNS, count, of_layers, outputs_of, paths_of, shapes_of
from small_models import INSTANCES, TEXTS, UNREAD, compiled, image_shape, small

from bnn_jax.layers import BinaryConv, BinaryDense
from bnn_jax.models import MODELS
from bnn_jax.models.build import build_model
from bnn_jax.models.residual import ResidualNetwork
from bnn_jax.outputs import init_network
from bnn_jax.stages.warm_start import by_name
from bnn_jax.training.config import Config, ModelConfig, OptimConfig
from bnn_jax.training.experiment import ImageInfo, make_experiment, make_model
from bnn_jax.training.step import init_state, train_step
from bnn_jax.training.validation import validate

ADAM = OptimConfig("adam", learning_rate=0.01)
SMALL = sorted(INSTANCES.values())
COMPILED = compiled(SMALL)
CLASSES = {type(MODELS[name].constructor(num_classes=2)): name for name in reversed(MODELS)}
"""One name for each class of networks."""

CATALOGUE = {
    "LeNet": "lenet",
    "BNN ConvNet": "bnn_convnet",
    "BinaryConnect ConvNet": "binaryconnect_convnet",
    "MNIST MLP": "mnist_mlp",
    "VGG-small": "vgg_small",
    "BNN+ VGG": "bnn_plus_vgg",
    "BNN+ AlexNet": "bnn_plus_alexnet",
    "AlexNet of XNOR-Net": "alexnet_xnor",
    "AlexNet of DoReFa-Net": "alexnet_dorefa",
    "ResNet-20": "resnet20",
    "ResNet-18": "resnet18",
    "ResNet-34": "resnet34",
    "BNN ResNet-18": "bnn_resnet18",
    "XNOR-Net ResNet-18": "xnor_resnet18",
    "XNOR-Net ResNet-34": "xnor_resnet34",
    "XNOR-Net++ ResNet-18": "xnor_pp_resnet18",
    "Bi-Real Net 18": "bireal18",
    "Bi-Real Net 34": "bireal34",
    "EBi-Real Net 18": "ebireal18",
    "EBi-Real Net 34": "ebireal34",
    "IR-Net ResNet-20": "irnet_resnet20",
    "RBNN ResNet-20": "rbnn_resnet20",
    "RBNN ResNet-18": "rbnn_resnet18",
    "TBN ResNet-18": "tbn_resnet18",
    "TBN ResNet-34": "tbn_resnet34",
    "ReActNet-18": "reactnet18",
    "ReActNet-A": "reactnet_a",
    "ReActNet without batch norm": "reactnet18_bn_free",
    "Real-to-Binary": "real_to_binary_resnet18",
    "Real-to-Binary, strong baseline": "real_to_binary_baseline_resnet18",
    "FTBNN": "ftbnn_resnet18",
    "CI-Net": "cinet_resnet18",
    "BinaryDuo VGG-7": "binaryduo_vgg7",
    "BinaryDuo ResNet-18": "binaryduo_resnet18",
    "DGRL": "dgrl_resnet18",
    "BNAS-E": "bnas_e",
    "BinaryDenseNet28": "binary_densenet28",
    "BinaryDenseNet37": "binary_densenet37",
    "BinaryDenseNet45": "binary_densenet45",
    "BinaryDenseNet51(32)": "binary_densenet51",
    "BinaryDenseNet69(32)": "binary_densenet69",
    "IGP-ResNet21(53)": "igp_resnet21",
    "IGP-ResNet37(41)": "igp_resnet37",
    "IGP-ResNet41(48)": "igp_resnet41",
    "IGP-ResNet69(31)": "igp_resnet69",
    "IGP-DenseNet51(53)": "igp_densenet51",
    "IGP-DenseNet69(48)": "igp_densenet69",
    "Wide ResNet-40-4 of Deep Frank-Wolfe": "wide_resnet40_4",
    "DenseNet-40-40 of Deep Frank-Wolfe": "densenet40_40",
    "BinaryAlexNet": "binary_alexnet",
    "BinaryResNetE18": "binary_resnet_e18",
    "QuickNet S": "quicknet_small",
    "QuickNet M": "quicknet",
    "QuickNet L": "quicknet_large",
    "MeliusNet22": "meliusnet22",
    "Bi-Real Net 50": "bireal50",
    "PokeBNN": "pokebnn",
    "BNext-T": "bnext_tiny",
    "ViT with BinaryAttention": "vit_tiny",
    "BitNet b1.58": "bitnet_lm",
}


def test_every_network_of_the_catalogue_is_in_the_table():
    assert not set(CATALOGUE.values()) - set(MODELS)


def test_every_network_can_be_trained_with_its_published_quantizers():
    for name in MODELS:
        config = Config("test", epochs=1, batch_size=1, loss="cross_entropy", model=ModelConfig(name), optim=ADAM)
        model = validate(config).model
        assert (model.input_quantizer, model.kernel_quantizer) == MODELS[name][1:3], name


def takes(name: str, option: str) -> bool:
    return option in inspect.signature(MODELS[name].constructor).parameters


@pytest.mark.parametrize("name", compiled(MODELS))
def test_published_size_builds(name):
    """In evaluation, on 32x32 images where the network takes them, by tracing alone."""
    options = {"stem": "cifar"} if takes(name, "stem") else {}
    model = make_model(ModelConfig(name, options=options), num_classes=7)
    shape = TEXTS.get(name, (224 if name.startswith(("alexnet", "binary_alexnet")) else 32,) * 2 + (3,))
    logits, intermediates = outputs_of(model, shape)
    tokens = shape[:1] if name in TEXTS else ()
    assert logits.shape == (1, *tokens, 7) and logits.dtype == jnp.float32
    assert intermediates["features"].shape[0] == 1


@lru_cache
def small_shapes(name: str, real: bool = False):
    quantizers = {f"{kind}_quantizer": "full_precision" for kind in ("input", "kernel")} if real else {}
    model = make_model(small(name, **quantizers), num_classes=5)
    return model, shapes_of(model, image_shape(name))


@pytest.mark.parametrize("name", COMPILED)
def test_in_full_precision_every_kernel_is_real(name):
    """And the same: the quantizers decide the name of a kernel alone."""
    kernels = lambda params: of_layers(params, "kernel") | of_layers(params, "latent_kernel")
    params, real = small_shapes(name)[1]["params"], small_shapes(name, real=True)[1]["params"]
    assert count(real, "latent_kernel") == 0 and of_layers(real, "kernel") == kernels(real)
    learned = {layer for layer in kernels(params) if layer.endswith("_quantizer")}
    assert {layer: shape for layer, shape in kernels(params).items() if layer not in learned} == kernels(real)


REFUSED = (
    ("num_classes", 0, r"`num_classes` \(=0\) of {} must be positive"),
    ("width", -4, r"`width` \(=-4\) of {} must be positive; \d+ is usual"),
    ("stage_sizes", (2, 0), r"`stage_sizes` \(=\(2, 0\)\) of {} must be positive numbers, at least one; \(.*\) is"),
    ("stage_sizes", (), r"`stage_sizes` \(=\(\)\) of {} must be positive numbers, at least one"),
    ("stem", "imagenett", r"`{}.stem` \(='imagenett'\) is not known; did you mean 'imagenet'\?"),
)


@pytest.mark.parametrize("name", CLASSES.values())
def test_sizes_are_checked(name):
    constructor = MODELS[name].constructor
    network = type(constructor(num_classes=2)).__name__
    for option, value, message in REFUSED:
        if takes(name, option):
            with pytest.raises(ValueError, match=message.format(network)):
                constructor(**{"num_classes": 2} | {option: value})


RESIDUAL = [name for network, name in CLASSES.items() if issubclass(network, ResidualNetwork)]


@pytest.mark.parametrize("name", RESIDUAL)
@pytest.mark.parametrize(("stem", "side"), [("cifar", 16), ("cifar", 33), ("imagenet", 20), ("imagenet", 33)])
def test_stages_halve_images_of_any_size(name, stem, side):
    model = MODELS[name].constructor(num_classes=3, width=8, stem=stem, stage_sizes=(1, 1, 1))
    logits, intermediates = outputs_of(model, (side, side + 1, 3))
    sides, width = [side, side + 1], 8
    doubled = name in ("reactnet_a", "bnext_tiny")
    for _ in range(0 if stem == "cifar" else 1 if doubled else 2):
        sides = [-(-n // 2) for n in sides]
    for stage in (1, 2, 3):
        width = width if stage == 1 and not doubled else 2 * width
        assert intermediates[f"stage{stage}"].shape == (1, *sides, width)
        sides = [-(-n // 2) for n in sides]
    assert intermediates["features"].shape == (1, width)
    assert (logits.shape, logits.dtype) == ((1, 3), jnp.float32)


@pytest.mark.parametrize(
    "names",
    [
        ("resnet20", "bireal_resnet20", "irnet_resnet20", "reactnet_resnet20"),
        ("resnet18", "bireal18", "irnet_resnet18", "reactnet18", "dgrl_resnet18", "real_to_binary_resnet18"),
        ("ebireal18", "ftbnn_resnet18", "bireal18"),
        ("xnor_resnet18", "cinet_resnet18", "bnn_resnet18"),
    ],
)
@pytest.mark.full
def test_weights_pass_from_family_to_family(names):
    """All that the next network has no equal for is what its family alone has: a shortcut's conv, branches, gates."""
    shapes = []
    for name in names:
        options = {"shortcut": "conv"} if name == "irnet_resnet20" else {}
        shapes.append(shapes_of(make_model(ModelConfig(name, options=options), num_classes=10), 32))
    for before, (name, after) in zip(shapes, zip(names[1:], shapes[1:])):
        missing = by_name(before, after).initialised
        own = {"dgrl_resnet18": ("branch",), "real_to_binary_resnet18": ("gate",), "bireal_resnet20": ("downsample",)}
        lost = [path for path in missing if path.endswith("kernel") or "downsample" in path]
        known = own.get(name, ("downsample_norm",) if name == names[1] and "resnet18" in name else ())
        assert [path for path in lost if not any(part in path for part in known)] == [], name
        assert sum(path.endswith("/latent_kernel") for path in paths_of(after["params"])) >= 16


@pytest.mark.parametrize("name", COMPILED)
def test_gradients_of_quantized_layers_are_quantized(name):
    """With a gradient quantizer each layer has it that quantizes, and no other; an AlexNet of DoReFa-Net by itself."""
    seen, layers = [], []
    model, shapes = small_shapes(name)
    if model.input_quantizer is model.kernel_quantizer is None:  # published in full precision
        model = model.clone(input_quantizer=SIGNS["input_quantizer"])
    model = model.clone(gradient_quantizer=lambda y, key: seen.append(y.shape) or y)

    def remember(call, arguments, options, context):
        layer = context.module
        if isinstance(layer, BinaryConv | BinaryDense) and context.method_name == "__call__":
            layers.append((layer.input_quantizer or layer.kernel_quantizer, layer.gradient_quantizer))
        return call(*arguments, **options)

    def run(variables, train):
        rngs, images = {"quantizer": jax.random.key(0)}, jnp.zeros((2, *image_shape(name)))
        with nn.intercept_methods(remember):
            return model.apply(variables, images, train=train, mutable=True, rngs=rngs)

    jax.eval_shape(partial(run, train=False), shapes)
    assert seen == []
    jax.eval_shape(partial(run, train=True), shapes)
    if name != "alexnet_dorefa":
        assert all((quantizer is None) == (gradient is None) for quantizer, gradient in layers)
        assert 2 * len(seen) == sum(gradient is not None for _, gradient in layers)
    assert seen


def trainer(name: str, model: ModelConfig):
    """A small network's compiled training step, its first state, images and labels."""
    statistics = ((0.0,), (1.0,)) if name in TEXTS else ((0.5,) * 3, (0.25,) * 3)
    info = ImageInfo(image_shape(name), 5, *statistics)
    config = Config("test", epochs=1, batch_size=4, loss="cross_entropy", model=model, optim=ADAM)
    experiment = make_experiment(validate(config), info, total_steps=2, learning_rate=0.01)
    rng = np.random.default_rng(0)
    images = jnp.asarray(rng.integers(0, 5 if name in TEXTS else 256, (4, *info.shape)), jnp.uint8)
    tokens = info.shape[:1] if name in TEXTS else ()
    labels = jnp.asarray(rng.integers(0, 5, (4, *tokens)), jnp.int32)
    state = jax.jit(partial(init_state, experiment))(jnp.uint32(0))
    return jax.jit(partial(train_step, experiment)), state, images, labels


@pytest.mark.parametrize("name", COMPILED)
def test_two_training_steps(name):
    """Fake images: the loss stays finite and every parameter moves in each step; one compiled program for both.

    Adam without weight decay moves a parameter only by its gradient, and by any that is not zero.
    """
    step, state, images, labels = trainer(name, small(name))
    for _ in range(2):
        before = state.params
        state, metrics = step(state, images, labels)
        assert np.isfinite(metrics["loss"])
        for path, leaf in jax.tree_util.tree_leaves_with_path(state.params):
            assert jnp.isfinite(leaf).all(), path
        moved = jax.tree.map(lambda old, new: bool((old != new).any()), before, state.params)
        still = [jax.tree_util.keystr(path) for path, moves in jax.tree_util.tree_leaves_with_path(moved) if not moves]
        assert still == UNREAD.get(name, [])
    assert step._cache_size() == 1


@pytest.mark.full
def test_dorefas_triple_is_one_config():
    """Weights of 1 bit, activations of 2, gradients of 2: what the last quantized layer sees changes, not the head."""
    triple = {"gradient_quantizer": "dorefa", "gradient_quantizer_options": {"bits": 2}}
    after = {}
    for quantizers in ({}, triple):
        model = small("resnet6", input_quantizer="dorefa", kernel_quantizer="dorefa", **quantizers)
        step, state, images, labels = trainer("resnet6", model)
        after[len(quantizers)] = paths_of(step(state, images, labels)[0].params)
    same = {path for path in after[0] if (after[0][path] == after[2][path]).all()}
    assert same == {path for path in after[0] if path.startswith(("head", "norm"))}


def test_a_constructor_is_taken_as_a_name_is():
    """With the quantizers that are named, in full precision without."""

    class Network(nn.Module):
        num_classes: int
        input_quantizer: object
        kernel_quantizer: object

    model = build_model(Network, num_classes=3, kernel_quantizer="binary")
    assert (model.num_classes, model.input_quantizer) == (3, None)
    assert model.kernel_quantizer.code_set == (-1, 1)
    lenet = build_model(MODELS["lenet"], num_classes=3)
    assert lenet.clone(kernel_quantizer=None) == MODELS["lenet"].constructor(num_classes=3)


@pytest.mark.parametrize("name", ["resnet18", "lenet", "vit_tiny", "mnist_mlp"])
def test_images_without_channels_are_refused(name, unchecked):
    model = make_model(small(name), num_classes=3)
    with pytest.raises(ValueError, match=r"`images` of `\w+` \(of shape \(16, 32, 32\)\) must be of shape \(batch,"):
        jax.eval_shape(lambda x: init_network(model, jax.random.key(0), x), jnp.ones((16, 32, 32)))


@pytest.mark.parametrize("name", [name for name in CLASSES.values() if name not in TEXTS])
def test_images_without_values_are_refused(name):
    """Of no pixels or no channels; a batch of no images is none the less one."""
    model, variables = small_shapes(name)
    height, width, channels = image_shape(name)
    for shape in ((0, width, channels), (height, 0, channels)):
        message = (
            rf"^`images` \(of {shape[0]}x{shape[1]}\) are too small for (an?|the|this) [\w-]+.*; they need \d+x\d+"
        )
        with pytest.raises(ValueError, match=message):
            shapes_of(model, shape)
    message = r"`images.shape` \(=\(1, \d+, \d+, 0\)\) must have a channel at least; gray has one"
    with pytest.raises(ValueError, match=message):
        shapes_of(model, (height, width, 0))
    empty = jax.ShapeDtypeStruct((0, height, width, channels), jnp.float32)
    logits, _ = jax.eval_shape(lambda v, x: model.apply(v, x, train=False), variables, empty)
    assert logits.shape == (0, 5)


@pytest.mark.parametrize("name", ["lenet", "mnist_mlp", "resnet6"])
def test_a_batch_of_no_images_has_no_logits(name):
    model, shape = make_model(small(name), num_classes=5), image_shape(name)
    variables = jax.jit(partial(model.init, train=False))(jax.random.key(0), jnp.zeros((1, *shape)))
    assert jax.jit(partial(model.apply, train=False))(variables, jnp.zeros((0, *shape)))[0].shape == (0, 5)


def test_bytes_are_told_to_be_normalized(unchecked):
    model = make_model(small("lenet"), num_classes=3)
    with pytest.raises(TypeError, match=r"got uint8; images of 0..255 go through `bnn_jax.data.normalize` first"):
        jax.eval_shape(lambda x: init_network(model, jax.random.key(0), x), jnp.ones((1, 16, 16, 3), jnp.uint8))


def test_options_of_real_networks():
    """A pair of stages may be decoupled where its inputs are real; without dropout no random numbers are needed."""
    real = {"input_quantizer": "full_precision", "options": {"coupled": False}}
    assert build_model("binaryduo_vgg7", num_classes=3, quantizers={"conv3": "binary"}, **real).coupled is False
    model = build_model("mnist_mlp", num_classes=3, width=4, options={"hidden_dropout": 0.0, "input_dropout": 0.0})
    x = jnp.ones((4, 2, 2, 1))
    variables = model.init(jax.random.key(0), x, train=False)
    model.apply(variables, x, train=True, mutable=["batch_stats"])


def test_lists_in_options_are_tuples():
    """As JSON has them; Flax hashes networks."""
    given = {"stage_sizes": [1, 1], "reduction": [2.0], "rounding": 1}
    model = build_model("binary_densenet28", num_classes=3, width=4, options=given)
    assert model.reduction == (2.0,) and model.stage_sizes == (1, 1)
    assert hash(model) == hash(model.clone())
