"""Layers in numpy, by their formulas, for tests to compare networks with."""

import numpy as np


def correlate(x, kernel, stride: int = 1, padding: int = 0, dilation: int = 1, pad_value: float = 0.0):
    """Correlation of NHWC images with a HWIO kernel, by loops over the kernel's taps."""
    x = np.pad(x, ((0, 0), (padding, padding), (padding, padding), (0, 0)), constant_values=pad_value)
    rows, columns = ((n - dilation * (k - 1) - 1) // stride + 1 for n, k in zip(x.shape[1:3], kernel.shape))

    def tap(i, j):
        i, j = dilation * i, dilation * j
        return x[:, i : i + stride * (rows - 1) + 1 : stride, j : j + stride * (columns - 1) + 1 : stride]

    return sum(tap(i, j) @ kernel[i, j] for i, j in np.ndindex(*kernel.shape[:2]))


def normalize(x, variables, name: str, epsilon: float = 1e-5):
    """The batch norm `name` in evaluation."""
    params, stats = variables["params"][name], variables["batch_stats"][name]
    return (np.asarray(x) - stats["mean"]) / np.sqrt(stats["var"] + epsilon) * params["scale"] + params["bias"]


def signs(x):
    return np.where(x < 0, -1.0, 1.0)


def relu(x):
    return np.maximum(x, 0)


def magnitude_aware(kernel):
    """Signs, scaled by each filter's mean |w|."""
    return signs(kernel) * np.abs(kernel).mean((0, 1, 2))


def rprelu(y, params):
    y = y - params["input_shift"]
    return np.where(y > 0, y, params["slope"] * y) + params["output_shift"]


def means_of_2x2(x):
    """2x2 means, the last row and column doubled where their number is odd."""
    b, h, w, c = x.shape
    x = np.pad(x, ((0, 0), (0, h % 2), (0, w % 2), (0, 0)), mode="edge")
    return x.reshape(b, -(-h // 2), 2, -(-w // 2), 2, c).mean((2, 4))


def maxima(x, size: int = 2, stride: int = 2):
    """Maxima of windows that lie whole in the image."""
    h, w = ((n - size) // stride + 1 for n in x.shape[1:3])
    windows = (
        x[:, i : i + stride * (h - 1) + 1 : stride, j : j + stride * (w - 1) + 1 : stride]
        for i, j in np.ndindex(size, size)
    )
    return np.max(list(windows), axis=0)


def stem_of(variables, images):
    """What a stem for small images hands on, before its activation."""
    return normalize(correlate(images, variables["params"]["stem"]["kernel"], padding=1), variables, "stem_norm")


def projected(x, variables, stride: int):
    """S(x) of Bi-Real Net: x, or of a stride its 2x2 means, convolved 1x1 and normalized."""
    if "downsample" not in variables["params"]:
        return x
    x = means_of_2x2(x) if stride > 1 else x
    return normalize(correlate(x, variables["params"]["downsample"]["kernel"]), variables, "downsample_norm")
