"""The table of networks: complete, published quantizers, and two training steps of each."""

import inspect
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_models import INSTANCES, LARGE, SIDES, UNREAD, small

from bnn_jax.models import MODELS
from bnn_jax.training.config import Config, ModelConfig, OptimConfig
from bnn_jax.training.experiment import ImageInfo, make_experiment, make_model
from bnn_jax.training.step import init_state, train_step
from bnn_jax.training.validation import validate

ADAM = OptimConfig("adam", learning_rate=0.01)

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
}


def test_every_network_of_the_catalogue_is_in_the_table():
    assert not set(CATALOGUE.values()) - set(MODELS)


def test_every_network_has_its_published_quantizers():
    for name in MODELS:
        validate(Config("test", epochs=1, batch_size=1, loss="cross_entropy", model=ModelConfig(name), optim=ADAM))


@pytest.mark.parametrize("name", MODELS)
def test_published_size_builds(name):
    """In evaluation, on 32x32 images where the network takes them, by tracing alone."""
    side = 224 if name.startswith("alexnet") else 32
    options = {"stem": "cifar"} if "stem" in inspect.signature(MODELS[name].constructor).parameters else {}
    model = make_model(ModelConfig(name, options=options), num_classes=7)

    def run():
        return model.init_with_output(jax.random.key(0), jnp.zeros((2, side, side, 3)), train=False)[0]

    logits, intermediates = jax.eval_shape(run)
    assert logits.shape == (2, 7) and logits.dtype == jnp.float32
    assert intermediates["features"].shape[0] == 2


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.full if n in LARGE else ()) for n in sorted(INSTANCES.values())]
)
def test_two_training_steps(name):
    """Fake images: the loss stays finite and every parameter moves in each step; one compiled program for both.

    Adam without weight decay moves a parameter only by its gradient, and by any that is not zero.
    """
    side = SIDES.get(name, 16)
    info = ImageInfo((side, side, 3), 5, (0.5,) * 3, (0.25,) * 3)
    config = Config("test", epochs=1, batch_size=4, loss="cross_entropy", model=small(name), optim=ADAM)
    experiment = make_experiment(validate(config), info, total_steps=2, learning_rate=0.01)
    rng = np.random.default_rng(0)
    images = jnp.asarray(rng.integers(0, 256, (4, *info.shape)), jnp.uint8)
    labels = jnp.asarray(rng.integers(0, 5, 4), jnp.int32)
    step = jax.jit(partial(train_step, experiment))
    state = jax.jit(partial(init_state, experiment))(jnp.uint32(0))
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
