"""LeNet: weight bits of the survey's table, by hand count; pooling and logits against numpy."""

import numpy as np
import pytest
from networks import SIGNS, apply, exact, normal, random_variables, shapes_of
from numpy_layers import correlate, maxima, relu, signs

from bnn_jax.analysis.accounting import account_model
from bnn_jax.models import LeNet

BINARY = SIGNS["kernel_quantizer"]


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
    model = LeNet(num_classes=10, **arguments)
    assert account_model(model, (32, 32, 3)).convolution_bits == bits


@pytest.mark.parametrize(("kernel_size", "features"), [(5, 16 * 5 * 5), (3, 16 * 6 * 6)])
def test_the_dense_layers_are_in_full_precision(kernel_size, features):
    parameters = shapes_of(LeNet(num_classes=10, kernel_quantizer=BINARY, kernel_size=kernel_size), 32)["params"]
    assert parameters["dense1"]["kernel"].shape == (features, 120)
    assert parameters["dense2"]["kernel"].shape == (120, 84)
    assert parameters["head"]["kernel"].shape == (84, 10)


@pytest.mark.parametrize("size", [16, 19])
def test_logits_equal_a_numpy_network(size):
    model, images = LeNet(num_classes=4, width=3, kernel_quantizer=BINARY), normal(2, size, size, 3, seed=0)
    variables = random_variables(model, images)
    logits, intermediates = apply(model, variables, images)
    x, weights = exact(images), exact(variables["params"])
    for conv in ("conv1", "conv2"):
        x = relu(maxima(correlate(x, signs(weights[conv]["latent_kernel"]))))
        np.testing.assert_allclose(intermediates[conv], x, rtol=1e-4, atol=1e-4)
    x = x.reshape((2, -1))
    for name in ("dense1", "dense2", "head"):
        x = x @ weights[name]["kernel"] + weights[name]["bias"]
        x = relu(x) if name != "head" else x
    np.testing.assert_allclose(logits, x, rtol=1e-4, atol=1e-4)


def test_binary_inputs_leave_the_image_real():
    model, images = LeNet(num_classes=4, extra_layers=1, **SIGNS), normal(2, 32, 32, 3)
    variables = random_variables(model, images)
    conv1, doubled = (apply(model, variables, scale * images)[1]["conv1"] for scale in (1, 2))
    # The ReLU before the extra layer leaves no negative input, so its binary inputs are all +1 and forget the image.
    np.testing.assert_array_equal(conv1, doubled)
    assert conv1.shape == (2, 14, 14, 6)


def test_images_too_small():
    with pytest.raises(
        ValueError, match=r"`images` \(of 8x8\) are too small for a LeNet with `kernel_size` 5; they need 16x16 pixels"
    ):
        shapes_of(LeNet(num_classes=10), (8, 8, 1))
