"""The Real-to-Binary gate against numpy, CI-Net's corrections against a loop over edges and pixels."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bnn_jax.layers import ChannelGate, ChannelInteractions


def test_the_gate_equals_numpy():
    z = np.random.default_rng(1).normal(size=(3, 4, 5, 16)).astype(np.float32)
    gate, variables = ChannelGate(features=6).init_with_output(jax.random.key(0), jnp.asarray(z))
    w1, w2 = (np.asarray(variables["params"][name]["kernel"], np.float64) for name in ("squeeze", "expand"))
    assert (w1.shape, w2.shape) == ((16, 2), (2, 6))
    expected = 1 / (1 + np.exp(-np.maximum(z.mean((1, 2)) @ w1, 0) @ w2))
    assert gate.shape == (3, 1, 1, 6)
    np.testing.assert_allclose(gate[:, 0, 0], expected, rtol=1e-5)
    assert (expected > 0).all() and (expected < 1).all()


@pytest.mark.parametrize(
    ("channels", "features", "count"),
    [(64, 64, 1024), (128, 128, 4096), (256, 256, 16_384), (512, 512, 65_536), (64, 128, 1536)],
)
def test_extra_parameters_of_the_published_gates(channels, features, count):
    """C_in / 8 (C_in + C_out), no biases."""
    shapes = jax.eval_shape(ChannelGate(features=features).init, jax.random.key(0), jnp.zeros((1, 2, 2, channels)))
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == count


def test_he_initialization():
    variables = ChannelGate(features=512).init(jax.random.key(0), jnp.ones((1, 1, 1, 512)))["params"]
    for name, fan_in in (("squeeze", 512), ("expand", 64)):
        np.testing.assert_allclose(variables[name]["kernel"].std(), np.sqrt(2 / fan_in), rtol=0.03)


def test_the_gradient_reaches_both_matrices_and_the_input():
    z = jnp.asarray(np.random.default_rng(1).normal(size=(4, 2, 2, 16)), jnp.float32)
    gate = ChannelGate(features=3, reduction=2)
    variables = gate.init(jax.random.key(1), z)
    gradient = jax.jit(jax.grad(lambda v, z: (gate.apply(v, z) ** 2).sum(), argnums=(0, 1)))(variables, z)
    assert all((np.abs(leaf) > 0).any() for leaf in jax.tree.leaves(gradient))


class Net(nn.Module):
    @nn.compact
    def __call__(self, z):
        return ChannelGate(features=3, name="gate")(z)


def test_gate_errors():
    message = (
        r"`reduction` \(=8\) must be at most 7, the number of the gate's inputs, in layer 'gate'; 8 is the paper's"
    )
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(Net().init, jax.random.key(0), jnp.zeros((1, 2, 2, 7)))
    with pytest.raises(ValueError, match=r"`reduction` \(=0\) must be a positive whole number in layer 'gate'"):
        ChannelGate(features=3, reduction=0, name="gate")
    with pytest.raises(ValueError, match=r"`features` \(=0\) must be a positive whole number in layer 'ChannelGate'"):
        ChannelGate(features=0)


def corrected(y, edges, thresholds, step, symmetric):
    """Loops over pixels, edges and thresholds."""
    out = y.astype(np.float64).copy()
    for pixel in np.ndindex(y.shape[:-1]):
        for source, target, level in edges:
            for threshold in thresholds[: abs(level)]:
                value = y[(*pixel, source)]
                if value >= threshold:
                    out[(*pixel, target)] += step if level > 0 else -step
                if value <= -threshold:
                    out[(*pixel, target)] += step if symmetric and level < 0 else -step
    return out


EDGES = ((0, 1, 1), (0, 2, -1), (1, 3, 0), (3, 1, -1), (2, 2, 1), (0, 1, 1))
CASES = [
    (EDGES, (200,), 100, False),
    (EDGES, (200,), 100, True),
    (((0, 1, 3), (0, 2, -2), (3, 0, 1), (2, 3, -3)), (200, 300, 250), 2, False),
    ((), (200,), 100, False),
]


@pytest.mark.parametrize(("edges", "thresholds", "step", "symmetric"), CASES)
def test_the_corrections_equal_a_loop(edges, thresholds, step, symmetric):
    y = np.random.default_rng(1).integers(-400, 400, size=(2, 6, 5, 4)).astype(np.float32)
    y[0, 0, 0], y[0, 0, 1] = 200, -200
    layer = ChannelInteractions(edges=edges, thresholds=thresholds, step=step, symmetric=symmetric)
    expected = corrected(y, edges, thresholds, step, symmetric)
    np.testing.assert_array_equal(jax.jit(lambda y: layer.apply({}, y))(y), expected)
    assert (expected != y).any() == bool(edges)


@pytest.mark.parametrize("as_given", [np.array, jnp.array, lambda edges: [list(edge) for edge in edges]])
def test_edges_come_as_an_array_too(as_given):
    layer = ChannelInteractions(edges=as_given(EDGES))
    assert layer == ChannelInteractions(edges=EDGES) and hash(layer) == hash(ChannelInteractions(edges=EDGES))
    assert layer.apply({}, jnp.full((1, 4), 250.0)).tolist() == [[250.0, 350.0, 250.0, 250.0]]
    assert ChannelInteractions(edges=np.zeros((0, 3), int)).apply({}, jnp.ones((1, 4))).tolist() == [[1.0] * 4]


@pytest.mark.parametrize(
    ("level", "symmetric", "low", "middle", "high"),
    [(1, False, -100, 0, 100), (-1, False, -100, 0, -100), (0, False, 0, 0, 0), (-1, True, 100, 0, -100)],
)
def test_the_asymmetry_of_the_release(level, symmetric, low, middle, high):
    layer = ChannelInteractions(edges=((0, 1, level),), symmetric=symmetric)
    y = jnp.array([[-200.0, 0.0], [-199.0, 0.0], [199.0, 0.0], [200.0, 0.0]])
    np.testing.assert_array_equal(layer.apply({}, y)[:, 1], [low, middle, middle, high])


def test_the_gradient_is_the_identity_to_the_target_alone():
    layer = ChannelInteractions(edges=((0, 1, 1), (0, 2, -1)))
    y, g = jnp.array([[250.0, 3.0, -3.0]]), jnp.array([[0.5, -2.0, 7.0]])
    np.testing.assert_array_equal(jax.vjp(lambda y: layer.apply({}, y), y)[1](g)[0], g)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"edges": ((0, 4, 1),)}, r"`edges` \(=\(0, 4, 1\)\) must join channels from 0 to 3 in layer 'ci'"),
        ({"edges": ((-1, 0, 1),)}, r"`edges` \(=\(-1, 0, 1\)\) must join channels from 0 to 3"),
        ({"edges": ((0, 1, 2),)}, r"must have levels from -1 to 1 in layer 'ci'; give more `thresholds`"),
        ({"edges": ((0, 1),)}, r"`edges` \(=\(0, 1\)\) must be \(source, target, level\) in layer 'ci'"),
        ({"edges": (0, 1, 1)}, r"`edges` \(=0\) must be \(source, target, level\) in layer 'ci'"),
        ({"edges": ((0, 1, 0.04),)}, r"`edges` \(=\(0, 1, 0.04\)\) must be \(source, target, level\)"),
        ({"thresholds": ()}, r"`thresholds` \(=\(\)\) must be one or more positive numbers in layer 'ci'"),
        ({"thresholds": (0,)}, r"`thresholds` \(=\(0,\)\) must be one or more positive numbers"),
    ],
)
def test_interaction_errors(options, message):
    with pytest.raises(ValueError, match=message):
        ChannelInteractions(name="ci", **options).apply({}, jnp.zeros((1, 4)))
