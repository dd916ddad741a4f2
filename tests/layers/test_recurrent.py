"""Recurrent layers of binary products against float64 loops, and frozen."""

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from networks import exact, normal, random_variables

from bnn_jax.analysis.accounting import account
from bnn_jax.layers import BinaryGRU, BinaryLSTM
from bnn_jax.packed import freeze, verify
from bnn_jax.quantizers import WEIGHT_QUANTIZERS, make_quantizer

QUANTIZERS = {"input_quantizer": "ste_sign", "kernel_quantizer": "xnor"}
sigmoid = lambda x: 1 / (1 + np.exp(-x))


def binary(x, layer):
    """sign(x) sign(W) mean|W| of each filter, with the bias if there is one."""
    signs = lambda a: np.where(a < 0, -1.0, 1.0)
    w = layer["latent_kernel"]
    return signs(x) @ signs(w) * np.abs(w).mean(0) + layer.get("bias", 0)


def lstm(x, params):
    h = c = np.zeros((len(x), 4))
    for token in x.swapaxes(0, 1):
        i, f, g, o = np.split(binary(token, params["inputs"]) + binary(h, params["hidden"]), 4, axis=1)
        c = sigmoid(f) * c + sigmoid(i) * np.tanh(g)
        h = sigmoid(o) * np.tanh(c)
        yield h


def gru(x, params):
    h = np.zeros((len(x), 4))
    for token in x.swapaxes(0, 1):
        (r, z, n), (r_h, z_h, n_h) = (
            np.split(binary(a, params[name]), 3, axis=1) for a, name in ((token, "inputs"), (h, "hidden"))
        )
        u = sigmoid(z + z_h)
        h = (1 - u) * np.tanh(n + sigmoid(r + r_h) * n_h) + u * h
        yield h


@pytest.mark.parametrize(("layer", "twin"), [(BinaryLSTM, lstm), pytest.param(BinaryGRU, gru, marks=pytest.mark.full)])
def test_hidden_states_are_those_of_a_loop_in_float64(layer, twin):
    layer, x = layer(4, **QUANTIZERS), normal(2, 3, 5)
    variables = random_variables(layer, x)
    expected = np.stack(list(twin(exact(x), exact(variables["params"]))), 1)
    found, gradient = jax.jit(jax.value_and_grad(lambda v: layer.apply(v, x).sum()))(variables)
    np.testing.assert_allclose(layer.apply(variables, x), expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(found, expected.sum(), rtol=1e-4)
    assert all(jnp.abs(leaf).max() > 0 for leaf in jax.tree.leaves(gradient))


class Reader(nn.Module):
    """An LSTM over the rows of an image."""

    @nn.compact
    def __call__(self, images, train=False):
        states = BinaryLSTM(32, **QUANTIZERS, name="lstm")(images.reshape(*images.shape[:2], -1), train=train)
        return nn.Dense(3, name="head")(states[:, -1])


@pytest.mark.full
def test_a_frozen_lstm_is_the_trained_one():
    model, images = Reader(), normal(2, 4, 8, 4)
    variables = model.init(jax.random.key(0), images)
    packed = freeze(model, variables, images.shape[1:])
    report = verify(model, variables, packed, [images])
    assert report.passed and report.largest_logit_difference == 0
    assert report.layers["lstm/hidden"].integers == 2 * 4 * 128
    counted = account(partial(model.apply, train=False), variables, images[:1])
    # The product of the first hidden state is a constant.
    assert counted.quantized_weights == {1: 2 * 32 * 128} and counted.macs().binary == 7 * 32 * 128


def test_impossible_features_are_refused():
    with pytest.raises(ValueError, match=r"`features` \(=0\) must be a positive whole number in layer 'lstm'"):
        BinaryLSTM(0, name="lstm")


@pytest.mark.parametrize("kernel", ["rbnn", "lq_net", "binary_connect"])
def test_kernels_that_change_from_token_to_token_are_refused(kernel):
    options = {"stochastic": True} if kernel == "binary_connect" else {}
    kernel = make_quantizer(WEIGHT_QUANTIZERS, kernel, **options)
    text = r"`kernel_quantizer` \(='Quantizer'\) must be the same for every token; .* in layer 'gru'"
    with pytest.raises(ValueError, match=text):
        BinaryGRU(4, kernel_quantizer=kernel, name="gru")


@pytest.mark.parametrize("layer", [BinaryLSTM, BinaryGRU])
def test_no_tokens_to_initialize_from_are_refused(layer):
    text = r"`x.shape` \(=\(2, 0, 5\)\) must have a token at least to initialize from in layer 'rnn'"
    with pytest.raises(ValueError, match=text):
        jax.eval_shape(layer(4, name="rnn").init, jax.random.key(0), jnp.zeros((2, 0, 5)))
    variables = jax.eval_shape(layer(4).init, jax.random.key(0), jnp.zeros((2, 1, 5)))
    assert jax.eval_shape(layer(4).apply, variables, jnp.zeros((2, 0, 5))).shape == (2, 0, 4)
