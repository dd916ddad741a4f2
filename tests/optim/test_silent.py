"""OvSW's scaling and decay against a float64 twin, over steps in which weights change their signs."""

import jax.numpy as jnp
import numpy as np
import optax
import pytest
from transforms import scanned

from bnn_jax.optim import is_latent, make_optimizer, overcome_silent_weights
from bnn_jax.schedules import constant

RNG = np.random.default_rng(0)
W = RNG.normal(size=(3, 3, 2, 5)).astype(np.float32) * np.float32([0.01, 0.1, 1, 3, 1e-5])
GRADIENTS = (0.1 * RNG.normal(size=(6, *W.shape))).astype(np.float32)
GRADIENTS[:, ..., 1] *= 1e-6
OPTIONS = {"least_ratio": 0.3, "penalty": 0.05, "flip_momentum": 0.8, "flip_threshold": 0.1}


def twin(w, gradients, *, least_ratio, penalty, flip_momentum, flip_threshold, rate, momentum, decay):
    """The weights after each step of SGD, filter by filter."""
    w, path = np.array(w, np.float64).reshape(-1, w.shape[-1]), []
    m, before, velocity = np.zeros_like(w), w < 0, np.zeros_like(w)
    for gradient in np.asarray(gradients, np.float64).reshape(len(gradients), *w.shape):
        g = gradient.copy()
        for f in range(w.shape[1]):
            size, weight = max(np.linalg.norm(g[:, f]), 1e-6), max(np.linalg.norm(w[:, f]), 1e-3)
            if size / weight < least_ratio:
                g[:, f] *= least_ratio * weight / size
        m = flip_momentum * m + (1 - flip_momentum) * ((w < 0) != before)
        g = g + penalty * (m < flip_threshold) * w
        before = w < 0
        velocity = momentum * velocity + g + decay * w
        w = w - rate * velocity
        path.append(w)
    return np.array(path)


def test_the_optimizer_equals_its_twin_and_leaves_real_weights_to_sgd():
    params = {"conv": {"latent_kernel": jnp.asarray(W)}, "head": {"kernel": jnp.asarray(W)}}
    gradients = {"conv": {"latent_kernel": jnp.asarray(GRADIENTS)}, "head": {"kernel": jnp.asarray(GRADIENTS)}}
    decays = {"weight_decay": 0.01, "latent_weight_decay": 0.01}
    settings = {"learning_rate": constant(1.0, 1), "momentum": 0.5, **decays}
    found = scanned(make_optimizer("ovsw", **settings, **OPTIONS), params, gradients)[0]
    expected = twin(W, GRADIENTS, **OPTIONS, rate=1.0, momentum=0.5, decay=0.01)
    signs = np.sign(np.concatenate([W.reshape(1, *expected[0].shape), expected]))
    assert (signs[1:] != signs[:-1]).sum() > 10 and (signs == signs[0]).all(0).sum() > 10
    np.testing.assert_allclose(found["conv"]["latent_kernel"].reshape(expected.shape), expected, rtol=1e-5, atol=1e-6)
    sgd = scanned(make_optimizer("sgd", **settings), params, gradients)[0]
    np.testing.assert_array_equal(found["head"]["kernel"], sgd["head"]["kernel"])


def test_without_ratio_and_penalty_nothing_changes():
    params, gradients = {"latent_kernel": jnp.asarray(W)}, {"latent_kernel": jnp.asarray(GRADIENTS[0])}
    transform = optax.masked(overcome_silent_weights(least_ratio=0.0, penalty=0.0), is_latent)
    updates, _ = transform.update(gradients, transform.init(params), params)
    np.testing.assert_array_equal(updates["latent_kernel"], GRADIENTS[0])


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"least_ratio": -1.0}, r"^`least_ratio` \(=-1\.0\) must not be negative; 0\.01 is usual$"),
        ({"penalty": -1.0}, r"^`penalty` \(=-1\.0\) must not be negative"),
        ({"flip_momentum": 2.0}, r"^`flip_momentum` \(=2\.0\) must be in \[0, 1\]"),
    ],
)
def test_arguments_out_of_range_are_refused(options, text):
    with pytest.raises(ValueError, match=text):
        overcome_silent_weights(**options)


def test_weights_are_needed():
    transform = overcome_silent_weights()
    with pytest.raises(ValueError, match="`params` must be given to `update`"):
        transform.update(jnp.ones(2), transform.init(jnp.ones(2)))
