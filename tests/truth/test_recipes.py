"""Losses and quantizers that are called after a paper or a program are that one's, transcribed here in float64.

The transcriptions keep the layouts of the programs: images (batch, channels, height, width), kernels (filters, inputs,
height, width).  Gradients are central differences of them, with sign's place taken by the function whose derivative the
program uses.
"""

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bnn_jax.distillation import (
    Outputs,
    distilled,
    embedding_distillation,
    shared_stages,
    similarity_distillation,
)
from bnn_jax.estimators import ESTIMATORS, rbnn_sign
from bnn_jax.layers import BatchNorm, BinaryConv, BinaryDense
from bnn_jax.models.build import build_model, quantizer_settings
from bnn_jax.packed import freeze, verify
from bnn_jax.packed.freezing import threshold_chains
from bnn_jax.quantizers import ACTIVATION_QUANTIZERS, WEIGHT_QUANTIZERS, bases, dequantize, make_quantizer
from bnn_jax.stages.recipes import RECIPES
from bnn_jax.training.config import Config, ModelConfig
from bnn_jax.training.experiment import ImageInfo, make_experiment, make_model


def drawn(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def differences(f, x, h=1e-5):
    """The gradient of f at x by central differences in float64."""
    x, gradient = np.array(x, np.float64), np.zeros(x.shape)
    for i in np.ndindex(x.shape):
        old = x[i]
        x[i] = old + h
        up = f(x)
        x[i] = old - h
        gradient[i] = (up - f(x)) / (2 * h)
        x[i] = old
    return gradient


def pulled_back(function):
    """(x, g) -> the function's value at x, and g pulled back to x; compiled."""

    def both(x, g):
        value, pull_back = jax.vjp(function, x)
        return value, pull_back(g)[0]

    return jax.jit(both)


def assert_same(found, expected, tolerance=1e-6):
    """To `tolerance` of the largest value expected."""
    expected = np.asarray(expected)
    np.testing.assert_allclose(found, expected, rtol=0, atol=tolerance * np.abs(expected).max())


def log_softmax(x):
    return x - x.max(-1, keepdims=True) - np.log(np.exp(x - x.max(-1, keepdims=True)).sum(-1, keepdims=True))


# ---- Real-to-Binary: attention matching

BLOCKS = [f"stage{1 + i // 2}_block{1 + i % 2}" for i in range(8)]


def maps(seed):
    """The outputs of eight blocks, some pixels larger than others."""
    return drawn(seed, 8, 2, 4, 4, 3) * np.exp(drawn(seed + 1, 8, 2, 4, 4, 1) / 2)


def paper_attention(own, wanted):
    """Martinez et al., 2020, section 4.2: the sum over blocks of the distance of maps of unit length, batch mean."""
    total = 0
    for a, b in zip(own, wanted):
        q_s, q_t = ((x**2).sum(-1).reshape(len(x), -1) for x in (a, b))
        difference = q_s / np.linalg.norm(q_s, axis=1)[:, None] - q_t / np.linalg.norm(q_t, axis=1)[:, None]
        total = total + np.linalg.norm(difference, axis=1)
    return total.mean()


def larq_attention(own, wanted):
    """AttentionMatchingLossLayer.call of larq zoo, but for its weight."""
    layer_losses = []
    for a, b in zip(own, wanted):
        q_s, q_t = ((x**2).mean(-1).reshape(len(x), -1) for x in (a, b))
        q_s, q_t = (q / q.max(-1, keepdims=True) for q in (q_s, q_t))
        layer_losses.append(((q_s - q_t) ** 2).mean(-1))
    return np.stack(layer_losses, -1).mean()


@pytest.mark.parametrize(("name", "transcription"), [("attention", paper_attention), ("attention_mse", larq_attention)])
def test_attention_over_eight_blocks(name, transcription):
    own, wanted = maps(0), maps(100)
    outputs = lambda maps: Outputs(jnp.zeros((2, 3)), dict(zip(BLOCKS, jnp.asarray(maps))))

    @jax.jit
    @jax.value_and_grad
    def term(own):
        return distilled(jnp.zeros(()), outputs(own), outputs(wanted), losses={name: 30.0})[0]

    found, gradient = term(own)
    wide, wide_teacher = (list(a.astype(np.float64)) for a in (own, wanted))
    expected = 30 * transcription(wide, wide_teacher)
    assert float(found) == pytest.approx(expected, rel=1e-6)
    # The weight 30 goes with a term that is at most 1: the paper's, summed over blocks, is a hundred times larger.
    assert (1 < expected < 5) if name == "attention_mse" else (100 < expected < 30 * 8 * 2**0.5)
    assert_same(gradient[0], differences(lambda a: 30 * transcription([a, *wide[1:]], wide_teacher), wide[0]))


def test_the_recipe_matches_the_eight_blocks_with_the_loss_its_weight_belongs_to():
    network = ModelConfig("real_to_binary_resnet18", width=4, options={"reduction": 2, "stem": "cifar"})
    stages = {stage.name: stage for stage in RECIPES["real_to_binary"](Config("r2b", 4, 2, model=network))}
    outputs = {}
    for name, stage in stages.items():
        model = make_model(stage.config.model, num_classes=3)
        shape = jax.ShapeDtypeStruct((2, 16, 16, 3), jnp.float32)
        init = partial(model.init_with_output, jax.random.key(0), train=False)
        outputs[name] = Outputs(*jax.eval_shape(init, shape)[0])
    for name in ("tanh", "inputs"):
        assert stages[name].config.distillation.losses == {"attention_mse": 30.0, "knowledge": 3.0}
        matched = [block for block, _, _ in shared_stages(outputs[name], outputs[stages[name].teacher])]
        assert matched == BLOCKS


# ---- S2-BNN: the distribution is over the components of the embedding


def released_s2_bnn(own, wanted, temperature):
    """builder.py (normalize), main_moco.py (division by moco_t), kd_loss.py (DistributionLoss)."""
    q_s, q_t = (z / np.linalg.norm(z, axis=1, keepdims=True) for z in (own, wanted))
    teacher = np.exp(log_softmax(q_t / temperature))
    return -(teacher * log_softmax(q_s / temperature)).sum(1).mean()


@pytest.mark.parametrize("temperature", [0.2, 0.07])
def test_s2_bnn_compares_the_components_of_the_embedding(temperature):
    own, wanted = drawn(1, 3, 8), drawn(2, 3, 8)
    loss = lambda z: embedding_distillation(z, wanted, temperature=temperature).mean()
    found, gradient = jax.jit(jax.value_and_grad(loss))(own)
    transcription = partial(released_s2_bnn, wanted=np.asarray(wanted, np.float64), temperature=temperature)
    assert float(found) == pytest.approx(transcription(np.asarray(own, np.float64)), rel=1e-6)
    assert_same(gradient, differences(transcription, own))
    by_keys = similarity_distillation(own, wanted, np.eye(8, dtype=np.float32), temperature=temperature)
    np.testing.assert_allclose(embedding_distillation(own, wanted, temperature=temperature), by_keys, rtol=1e-6)


def test_the_recipe_of_s2_bnn_has_the_loss_of_its_program():
    for stage in RECIPES["s2_bnn"](Config("s2", 4, 2))[1:3]:
        assert (stage.config.distillation.losses, stage.config.distillation.label_weight) == ({"embedding": 1.0}, 0.0)
        assert stage.config.distillation.temperature == 0.2


# ---- XNOR-Net and BNAS: centred weights


def hwio(w):
    return jnp.asarray(np.transpose(w, (2, 3, 1, 0) if w.ndim == 4 else (1, 0)), jnp.float32)


def oihw(w):
    return np.transpose(np.asarray(w, np.float64), (3, 2, 0, 1) if w.ndim == 4 else (1, 0))


def released_xnor(weight, grad, program):
    """BinOp of XNOR-Net-PyTorch's and BNAS's util.py; or util.lua of XNOR-Net for SGD: (binary weights, gradient)."""
    s, n = weight.shape, weight[0].size
    weight = np.clip(weight - weight.mean(1, keepdims=True), -1.0, 1.0)
    over = tuple(range(1, weight.ndim))
    m = np.broadcast_to(np.abs(weight).sum(over, keepdims=True) / n, s).copy()
    binary = np.sign(weight) * m
    if program == "torch":
        m[(weight <= -1) | (weight >= 1)] = 0
        return binary, grad * ((m + 1 / n) * (1 - 1 / s[1]) * n)
    m[(weight < -1.0) | (weight > 1.0)] = 0
    m = m * grad
    m_add = (np.sign(weight) * grad).sum(over, keepdims=True) / n * np.sign(weight)
    return binary, (m + m_add) * (1.0 - 1.0 / s[1]) * n


@pytest.mark.parametrize("shape", [(5, 4, 3, 3), (6, 12)])
@pytest.mark.parametrize(("program", "gradient"), [("pytorch", "exact"), ("torch", "diagonal")])
@pytest.mark.parametrize("size", [0.1, 1.5])
def test_xnor_as_released(shape, program, gradient, size):
    w, g = size * drawn(3, *shape), drawn(4, *shape)
    quantizer = make_quantizer(WEIGHT_QUANTIZERS, "xnor", center=True, as_released=True, gradient=gradient)
    value, pulled = pulled_back(lambda w: dequantize(quantizer.apply(w)))(hwio(w), hwio(g))
    binary, expected = released_xnor(w.astype(np.float64), g.astype(np.float64), program)
    assert_same(oihw(value), binary)
    found = oihw(pulled)
    if program == "torch":  # whose clipped weights, at -1 or 1 exactly, have the 1/n alone
        free = np.abs(w - w.mean(1, keepdims=True)) < 1
        found, expected = np.where(free, found, 0), np.where(free, expected, 0)
    assert_same(found, expected)
    assert (np.abs(w - w.mean(1, keepdims=True)).max() > 1) == (size > 1)


@pytest.mark.parametrize("network", ["bnas_a", "bnas_e"])
def test_bnas_is_published_as_released(network):
    settings = quantizer_settings(network)
    assert settings["kernel_quantizer"] == "xnor"
    assert settings["kernel_quantizer_options"] == {"center": True, "as_released": True}


def test_the_exact_gradient_through_the_centring_has_no_factor():
    w, g = 0.5 * drawn(5, 4, 3, 3, 3), drawn(6, 4, 3, 3, 3).astype(np.float64)

    def center(w):
        return w - w.mean(1, keepdims=True)

    def alpha(w):
        return np.abs(center(w)).mean((1, 2, 3), keepdims=True)

    start = w.astype(np.float64)
    codes, scale = np.sign(center(start)), alpha(start)

    def surrogate(w):  # alpha sign(w_c), the sign's place taken by clip where it is differentiated
        return (g * (alpha(w) * codes + scale * np.clip(center(w), -1, 1))).sum()

    quantizer = make_quantizer(WEIGHT_QUANTIZERS, "xnor", center=True)
    _, gradient = pulled_back(lambda w: dequantize(quantizer.apply(w)))(hwio(w), hwio(g))
    assert_same(oihw(gradient), differences(surrogate, w))
    assert_same(oihw(gradient).mean(1) + 1, np.ones((4, 3, 3)))


# ---- RBNN


def rbnn_tk(progress, *, activations):
    """cpt_tk of main.py, and what BinaryQuantize_a makes of it."""
    t = 10 ** (np.log10(1e-2) + (np.log10(10) - np.log10(1e-2)) * progress)
    k = max(1 / t, 1)
    return (max(t, 1), 1) if activations else (t, k)


def rbnn_sign_integral(x, t, k):
    """The function whose derivative is k max(0, sqrt(2) t - t^2 |x|)."""
    inside = np.minimum(np.abs(x), np.sqrt(2) / t)
    return k * np.sign(x) * (np.sqrt(2) * t * inside - t**2 * inside**2 / 2)


def rbnn_inputs(a):
    a1 = a - a.mean((1, 2, 3), keepdims=True)
    return a1 / a1.std((1, 2, 3), ddof=1, keepdims=True)


def test_rbnn_on_activations():
    a, g = 3 * drawn(7, 2, 5, 4, 3) + 1, drawn(8, 2, 5, 4, 3)
    nhwc = lambda x: jnp.asarray(np.transpose(x, (0, 2, 3, 1)), jnp.float32)
    apply = make_quantizer(ACTIVATION_QUANTIZERS, "rbnn").apply
    run = jax.jit(lambda a, g, p: pulled_back(lambda a: dequantize(apply(a, progress=p)))(a, g))
    wide = a.astype(np.float64)
    for progress in (0.0, 0.5, 0.8, 1.0):
        codes, gradient = run(nhwc(a), nhwc(g), progress)
        np.testing.assert_array_equal(codes, nhwc(np.sign(rbnn_inputs(wide))))
        t, k = rbnn_tk(progress, activations=True)
        surrogate = lambda a, t=t, k=k: (g * rbnn_sign_integral(rbnn_inputs(a), t, k)).sum()
        assert_same(gradient, nhwc(differences(surrogate, wide)))


SIGN_OF_INPUTS = {
    "rbnn_sign": {},
    "rsign": {"estimator": "rbnn_sign"},
    "residual": {"estimator": "rbnn_sign", "bases": 1},
}


def test_rbnn_sign_has_the_schedule_of_activations_where_it_quantizes_them():
    x = jnp.array([[[[1.5]]]])

    def slope(table, name, **options):
        quantizer = make_quantizer(table, name, **options)
        own = quantizer.init(jax.random.key(0), x) if quantizer.init else {}
        return float(jax.grad(lambda x: bases(quantizer.apply(x, progress=0.0, **own))[0].codes.sum())(x)[0, 0, 0, 0])

    t, k = rbnn_tk(0.0, activations=False)
    of_weights = slope(WEIGHT_QUANTIZERS, "binary", estimator="rbnn_sign")
    assert of_weights == pytest.approx(k * (2**0.5 * t - t**2 * 1.5), rel=1e-6)
    assert {name: slope(ACTIVATION_QUANTIZERS, name, **options) for name, options in SIGN_OF_INPUTS.items()} == (
        dict.fromkeys(SIGN_OF_INPUTS, 0.0)
    )
    assert slope(ACTIVATION_QUANTIZERS, rbnn_sign) == slope(ACTIVATION_QUANTIZERS, ESTIMATORS["rbnn_sign"]) == 0


def rbnn_sweeps(x, r1, r2):
    """BinarizeConv2d.forward: three sweeps."""
    for _ in range(3):
        b = np.sign(r1.T @ x @ r2)
        u, _, vt = np.linalg.svd(sum(bi @ r2.T @ xi.T for bi, xi in zip(b, x)))
        r1 = vt.T @ u.T
        u, _, vt = np.linalg.svd(sum(xi.T @ r1 @ bi for xi, bi in zip(x, b)))
        r2 = u @ vt
    return r1, r2


@pytest.mark.parametrize(("shape", "progress"), [((6, 4, 3, 3), 0.7), ((5, 12), 0.0)])
def test_rbnn_on_weights(shape, progress):
    w, g, over = drawn(9, *shape), drawn(10, *shape).astype(np.float64), tuple(range(1, len(shape)))
    quantizer = make_quantizer(WEIGHT_QUANTIZERS, "rbnn", detach_rotation=True)
    parameters = quantizer.init(jax.random.key(0), hwio(w))
    state = quantizer.init_state(jax.random.key(1), hwio(w))
    alpha = np.abs(w.astype(np.float64)).mean(over, keepdims=True)
    assert_same(oihw(parameters["scale"]), alpha)
    angle = drawn(11, shape[0], *(1,) * (len(shape) - 1))
    parameters["angle"] = hwio(angle)

    def standardized(w):
        w1 = w - w.mean(over, keepdims=True)
        return w1 / w1.std(over, ddof=1, keepdims=True)

    r1, r2 = (np.asarray(state[name], np.float64) for name in ("left", "right"))
    x = standardized(w.astype(np.float64)).reshape(shape[0], len(r1), len(r2))
    r1, r2 = rbnn_sweeps(x, r1, r2)
    r_weight = (r1.T @ x @ r2).reshape(shape)
    t, k = rbnn_tk(progress, activations=False)

    def w3(w, angle):
        return standardized(w) + np.abs(np.sin(angle)) * (r_weight - standardized(w))

    def surrogate(w, angle):
        return (g * alpha * rbnn_sign_integral(w3(w, angle), t, k)).sum()

    @jax.jit
    @partial(jax.grad, argnums=(0, 1), has_aux=True)
    def run(w, parameters):
        quantized, after = quantizer.apply(w, state, **parameters, train=True, progress=progress)
        return (dequantize(quantized) * hwio(g)).sum(), (quantized, after)

    (dw, dparameters), (quantized, after) = run(hwio(w), parameters)
    wide, wide_angle = w.astype(np.float64), angle.astype(np.float64)
    np.testing.assert_array_equal(oihw(quantized.codes), np.sign(w3(wide, wide_angle)))
    assert_same(after["left"], r1)
    assert_same(after["right"], r2)
    assert_same(oihw(dw), differences(lambda w: surrogate(w, wide_angle), wide))
    assert_same(oihw(dparameters["angle"]), differences(lambda angle: surrogate(wide, angle), wide_angle))
    assert_same(oihw(dparameters["scale"]), (g * np.sign(w3(wide, wide_angle))).sum(over, keepdims=True))


def test_a_run_renews_the_rotations_on_the_first_batch_of_every_epoch():
    network = ModelConfig("resnet6", width=4, input_quantizer="rbnn", kernel_quantizer="rbnn")
    config = Config("rbnn", epochs=3, batch_size=2, model=network)
    info = ImageInfo((8, 8, 1), 3, (0.0,), (1.0,))
    quantizer = make_experiment(config, info, total_steps=12).model.kernel_quantizer
    w = jnp.asarray(drawn(12, 3, 3, 4, 6))
    parameters, state = quantizer.init(jax.random.key(0), w), quantizer.init_state(jax.random.key(1), w)
    step = jax.jit(lambda w, state: quantizer.apply(w, state, **parameters, train=True, progress=0.5)[1])
    renewed = []
    for number in range(9):
        after = step(jnp.asarray(drawn(20 + number, *w.shape)), state)
        renewed.append(bool((after["left"] != state["left"]).any()))
        state = after
    assert renewed == [True, False, False, False, True, False, False, False, True]


class Rbnn(nn.Module):
    """conv -> BN -> conv -> BN -> dense with RBNN's quantizers."""

    @nn.compact
    def __call__(self, images, *, train):
        quantizers = {
            "input_quantizer": make_quantizer(ACTIVATION_QUANTIZERS, "rbnn"),
            "kernel_quantizer": make_quantizer(WEIGHT_QUANTIZERS, "rbnn"),
        }
        x = BinaryConv(32, padding=1, name="conv1", **quantizers)(images, train=train)
        x = BatchNorm(name="norm1")(x, train=train)
        x = BinaryConv(32, padding=1, name="conv2", **quantizers)(x, train=train)
        x = BatchNorm(name="norm2")(x, train=train)
        return BinaryDense(5, name="head", **quantizers)(x.reshape(len(x), -1), train=train), {}


@pytest.mark.full
def test_a_frozen_network_with_activations_standardized_by_example_is_the_trained_one():
    model, images = Rbnn(), jnp.asarray(drawn(30, 6, 6, 6, 3))
    variables = jax.jit(partial(model.init, train=False))(jax.random.key(0), images)
    # No threshold a channel stands for the comparison with an example's mean: normalizations stay numbers.
    assert threshold_chains(model, jax.eval_shape(lambda: variables), (6, 6, 3)) == ()
    report = verify(model, variables, freeze(model, variables, (6, 6, 3)), [images])
    assert report.passed
    assert set(report.layers) == {"conv1", "conv2", "head"}
    assert all(layer.integers and layer.bits for layer in report.layers.values())


# ---- IR-Net


@pytest.mark.parametrize(("network", "t_min"), [("irnet_resnet20", 1e-3), ("irnet_resnet18", 0.1), ("vgg_small", 0.1)])
def test_ir_net_starts_from_its_programs_t(network, t_min):
    model = build_model(network, num_classes=3)
    g = jnp.asarray(drawn(40, 12, 1))

    def run(quantizer):
        return jax.jit(lambda w, p: pulled_back(lambda w: dequantize(quantizer.apply(w, progress=p)))(w, g)[1])

    activations, weights = run(model.input_quantizer), run(model.kernel_quantizer)
    x = jnp.asarray(drawn(41, 12, 1))
    for progress in (0.0, 0.5):
        t = t_min * (10 / t_min) ** progress
        k = max(1 / t, 1)
        np.testing.assert_allclose(activations(x / t, progress), g * k * t * (1 - np.tanh(x) ** 2), rtol=1e-5)
    fixed = run(make_quantizer(WEIGHT_QUANTIZERS, "libra_pb", t=t, k=k))
    assert_same(weights(x, 0.5), fixed(x, 0.5), 1e-5)
