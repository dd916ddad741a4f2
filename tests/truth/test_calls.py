"""A network of one's own is called as it is written, with and without `train` and `progress`."""

from dataclasses import replace

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bnn_jax.analysis.accounting import account_model
from bnn_jax.layers import BinaryConv, BinaryDense
from bnn_jax.outputs import call_options
from bnn_jax.packed import PackedModel, freeze, verify
from bnn_jax.training.config import Config, ModelConfig, OptimConfig
from bnn_jax.training.epoch import evaluate
from bnn_jax.training.experiment import ImageInfo, make_experiment
from bnn_jax.training.step import init_state, train_step

SHAPE, CLASSES = (6, 6, 3), 4
SIGNS = {"input_quantizer": "ste_sign", "kernel_quantizer": "xnor"}


class Plain(nn.Module):
    """Neither `train` nor `progress`, logits alone."""

    @nn.compact
    def __call__(self, x):
        self.sow("intermediates", "seen", x)
        x = nn.GroupNorm(4)(BinaryConv(8, **SIGNS)(x))
        return BinaryDense(CLASSES, **SIGNS)(x.reshape(x.shape[0], -1))


class WithTrain(nn.Module):
    """Flax's own batch norm and dropout."""

    @nn.compact
    def __call__(self, x, train: bool):
        x = nn.BatchNorm(use_running_average=not train)(BinaryConv(8, **SIGNS)(x))
        x = nn.Dropout(0.5, deterministic=not train)(x.reshape(x.shape[0], -1))
        return nn.Dense(CLASSES)(x)


class Deterministic(nn.Module):
    """The flag of Flax's own examples, and a stream of random numbers of another name."""

    @nn.compact
    def __call__(self, x, *, deterministic=True):
        x = BinaryConv(8, **SIGNS)(x).mean((1, 2))
        if not deterministic:
            x = x + jax.random.normal(self.make_rng("noise"), x.shape)
        return nn.Dense(CLASSES)(nn.Dropout(0.5)(x, deterministic=deterministic)), {}


class AtRandom(nn.Module):
    """`train` and `progress` among other keywords."""

    @nn.compact
    def __call__(self, x, **flags):
        x = BinaryConv(8, input_quantizer="ede_sign", kernel_quantizer="xnor")(x, **flags)
        return nn.Dense(CLASSES)(x.mean((1, 2)))


NETWORKS = [Plain(), WithTrain(), Deterministic(), AtRandom()]
SEQUENTIAL = nn.Sequential([BinaryConv(8, **SIGNS), lambda x: x.mean((1, 2)), nn.Dense(CLASSES)])


def test_the_keywords_are_those_that_the_network_takes():
    half = {"train": True, "progress": 0.5}
    assert [call_options(network, **half) for network in (*NETWORKS, SEQUENTIAL)] == [
        {},
        {"train": True},
        {"deterministic": False},
        half,
        {},
    ]


@pytest.mark.parametrize(
    "model",
    [
        pytest.param(n, marks=() if isinstance(n, WithTrain) else pytest.mark.full, id=type(n).__name__)
        for n in NETWORKS
    ],
)
def test_a_step_an_evaluation_and_the_packed_network(model):
    images = np.random.default_rng(2).integers(0, 256, (6, *SHAPE), dtype=np.uint8)
    x, labels = jnp.asarray(images), jnp.arange(6) % CLASSES
    config = Config("test", epochs=1, batch_size=6, model=ModelConfig("resnet6"), optim=OptimConfig("adam"))
    config = replace(config, loss="cross_entropy")
    info = ImageInfo(SHAPE, CLASSES, (120.0,) * 3, (60.0,) * 3)
    experiment = make_experiment(config, info, total_steps=1)._replace(model=model)

    def run():
        state = init_state(experiment, 0)
        after, metrics = train_step(experiment, state, x, labels)
        again = init_state(experiment, 0, {"params": after.params})
        return after, again, metrics, evaluate(experiment, after.params, after.model_state, x, labels)

    after, again, metrics, found = jax.jit(run)()
    assert np.isfinite(metrics["loss"]) and np.isfinite(found["loss"]) and found["examples"] == 6
    assert set(after.model_state) == set(again.model_state) == ({"batch_stats"} if "Train" in repr(model) else set())
    variables = {"params": after.params, **after.model_state}
    packed = PackedModel(
        model, freeze(model, variables, SHAPE), {"image_shape": SHAPE, "mean": info.mean, "std": info.std}
    )
    assert verify(model, variables, packed.variables, [(x.astype("float32") - 120.0) / 60.0]).passed
    assert packed.logits(images).shape == (6, CLASSES)
    assert account_model(model, SHAPE).binary_weights >= 3 * 3 * 3 * 8


@pytest.mark.parametrize(
    ("quantizer", "options", "needed"),
    [
        ({"input_quantizer": "ede_sign"}, {}, "progress"),
        ({"input_quantizer": "ede_sign"}, {"train": True}, "progress"),
        ({"kernel_quantizer": "rbnn"}, {"progress": 0.5}, "train"),
        ({"input_quantizer": "gumbel_sign"}, {"progress": 0.5}, "train"),
        ({"gradient_quantizer": "dorefa"}, {}, "train"),
    ],
)
def test_a_layer_that_is_not_told_what_it_needs_is_refused(quantizer, options, needed):
    """It would take every step for an evaluation."""

    class Silent(nn.Module):
        @nn.compact
        def __call__(self, x, **flags):
            x = BinaryConv(4, **SIGNS, name="plain")(x)
            return nn.Dense(CLASSES)(BinaryConv(4, **SIGNS | quantizer, name="second")(x, **options).mean((1, 2)))

    config = Config("test", epochs=1, batch_size=6, model=ModelConfig("resnet6"))
    info = ImageInfo(SHAPE, CLASSES, (120.0,) * 3, (60.0,) * 3)
    experiment = make_experiment(config, info, total_steps=1)._replace(model=Silent())
    with pytest.raises(ValueError, match=rf"layer 'second' has quantizers that need `{needed}`, and is called without"):
        jax.eval_shape(lambda: init_state(experiment, 0))


def test_a_network_of_another_number_of_classes_is_refused():
    info = ImageInfo(SHAPE, 7, (120.0,) * 3, (60.0,) * 3)
    config = Config("test", epochs=1, batch_size=6, model=ModelConfig("resnet6"))
    experiment = make_experiment(config, info, total_steps=1)._replace(model=Plain())
    with pytest.raises(ValueError, match=r"returns logits of 4 classes, but the data have 7; .* `num_classes`"):
        jax.eval_shape(lambda: init_state(experiment, 0))
