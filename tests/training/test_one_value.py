"""Batch norm over one value: Flax's is warned of, ours refused in one sentence, and nothing else is either."""

import warnings

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest

from bnn_jax.errors import UsageError
from bnn_jax.layers import BatchNorm
from bnn_jax.outputs import apply_network
from bnn_jax.training.one_value import OneValueWarning, told_of_one_value


class Net(nn.Module):
    """Two convolutions, the second of which leaves one pixel of images of 4x4."""

    @nn.compact
    def __call__(self, x, train=False):
        for name, stride in (("wide", 2), ("narrow", 2)):
            x = nn.Conv(3, (2, 2), strides=stride)(x)
            x = nn.BatchNorm(use_running_average=not train, name=name)(x)
        return x.mean(axis=(1, 2))


def call(images, train=True, model=None):
    """Trace the network in training."""
    model = model or Net()
    variables = jax.eval_shape(model.init, jax.random.key(0), images)
    with warnings.catch_warnings(record=True) as told, told_of_one_value():
        warnings.simplefilter("always")
        jax.eval_shape(lambda v: apply_network(model, v, images, train=train, mutable=["batch_stats"]), variables)
    return [str(warning.message) for warning in told if warning.category is OneValueWarning]


def test_a_batch_norm_of_flax_over_one_value_is_warned_of_by_name():
    (text,) = call(jnp.zeros((1, 4, 4, 1)))
    assert text == (
        "narrow, of inputs of shape (1, 1, 1, 3), normalizes over one value of each channel in training, so that its "
        "output does not depend on its input: train on larger batches or images, or leave it out there"
    )


@pytest.mark.parametrize(("shape", "train"), [((2, 4, 4, 1), True), ((1, 8, 8, 1), True), ((1, 4, 4, 1), False)])
def test_two_values_or_running_averages_are_not(shape, train):
    assert call(jnp.zeros(shape), train) == []


def test_ours_is_refused_in_one_sentence():
    norm, x = BatchNorm(name="norm"), jnp.zeros((1, 1, 1, 3))
    variables = norm.init(jax.random.key(0), x, train=False)
    rule = r"`x.shape` \(=\(1, 1, 1, 3\)\) must hold at least two values of each channel .*; train on larger batches"
    with pytest.raises(UsageError, match=rule):
        norm.apply(variables, x, train=True, mutable=["batch_stats"])
