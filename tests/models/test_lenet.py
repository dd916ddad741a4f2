"""LeNet: weight bits of the survey's table, by hand count; pooling and logits against numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bnn_jax.analysis.accounting import account_model
from bnn_jax.models import MODELS
from bnn_jax.quantizers import ACTIVATION_QUANTIZERS, WEIGHT_QUANTIZERS

BINARY = WEIGHT_QUANTIZERS["binary"]()


def parameters_of(shape=(32, 32, 3), **arguments):
    model = MODELS["lenet"].constructor(num_classes=10, **arguments)
    images = jnp.zeros((1, *shape))
    return jax.eval_shape(lambda: model.init(jax.random.key(0), images, train=False))["params"]


@pytest.mark.parametrize(
    ("bits", "arguments"),
    [
        (91_200, {}),
        (2_850, {"kernel_quantizer": BINARY}),
        (3_750, {"kernel_quantizer": BINARY, "extra_layers": 1}),
        (11_850, {"kernel_quantizer": BINARY, "extra_layers": 10}),
        (47_850, {"kernel_quantizer": BINARY, "extra_layers": 50}),
        (1_026, {"kernel_quantizer": BINARY, "kernel_size": 3}),
    ],
)
def test_weight_bits_of_the_survey(bits, arguments):
    """So, A Survey of Gradient Estimators, table: bits of the convolution weights."""
    model = MODELS["lenet"].constructor(num_classes=10, **arguments)
    assert account_model(model, (32, 32, 3)).convolution_bits == bits


@pytest.mark.parametrize(("kernel_size", "features"), [(5, 16 * 5 * 5), (3, 16 * 6 * 6)])
def test_the_dense_layers_are_in_full_precision(kernel_size, features):
    parameters = parameters_of(kernel_quantizer=BINARY, kernel_size=kernel_size)
    assert parameters["dense1"]["kernel"].shape == (features, 120)
    assert parameters["dense2"]["kernel"].shape == (120, 84)
    assert parameters["head"]["kernel"].shape == (84, 10)


def correlate(x, kernel):
    """VALID correlation of one image, by loops over the kernel's taps."""
    height, width = x.shape[0] - kernel.shape[0] + 1, x.shape[1] - kernel.shape[1] + 1
    taps = np.ndindex(*kernel.shape[:2])
    return sum(x[i : i + height, j : j + width] @ kernel[i, j] for i, j in taps)


def pool(x):
    height, width = x.shape[0] // 2, x.shape[1] // 2
    windows = [x[i : 2 * height : 2, j : 2 * width : 2] for i in (0, 1) for j in (0, 1)]
    return np.maximum(np.max(windows, axis=0), 0)


@pytest.mark.parametrize("size", [16, 19])
def test_logits_equal_a_numpy_network(size):
    model = MODELS["lenet"].constructor(num_classes=4, width=3, kernel_quantizer=BINARY)
    images = np.random.default_rng(0).normal(size=(2, size, size, 3))
    variables = model.init(jax.random.key(0), jnp.asarray(images, jnp.float32), train=False)
    logits, intermediates = model.apply(variables, jnp.asarray(images, jnp.float32), train=False)
    weights = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), variables["params"])
    for image, found, conv1 in zip(images, logits, intermediates["conv1"]):
        x = pool(correlate(image, np.where(weights["conv1"]["latent_kernel"] < 0, -1.0, 1.0)))
        np.testing.assert_allclose(conv1, x, rtol=1e-4, atol=1e-4)
        x = pool(correlate(x, np.where(weights["conv2"]["latent_kernel"] < 0, -1.0, 1.0))).ravel()
        for name in ("dense1", "dense2", "head"):
            x = x @ weights[name]["kernel"] + weights[name]["bias"]
            x = np.maximum(x, 0) if name != "head" else x
        np.testing.assert_allclose(found, x, rtol=1e-4, atol=1e-4)


def test_binary_inputs_leave_the_image_real():
    model = MODELS["lenet"].constructor(
        num_classes=4, kernel_quantizer=BINARY, input_quantizer=ACTIVATION_QUANTIZERS["ste_sign"](), extra_layers=1
    )
    images = jnp.asarray(np.random.default_rng(1).normal(size=(2, 32, 32, 3)), jnp.float32)
    variables = model.init(jax.random.key(0), images, train=False)
    conv1 = model.apply(variables, images, train=False)[1]["conv1"]
    doubled = model.apply(variables, 2 * images, train=False)[1]["conv1"]
    # The ReLU before the extra layer leaves no negative input, so its binary inputs are all +1 and forget the image.
    np.testing.assert_array_equal(conv1, doubled)
    assert conv1.shape == (2, 14, 14, 6)


def test_images_too_small():
    with pytest.raises(
        ValueError, match=r"`images` \(of 8x8\) are too small for a LeNet with `kernel_size` 5; they need 16x16 pixels"
    ):
        parameters_of((8, 8, 1))
