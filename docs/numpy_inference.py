"""The accuracy of an exported network, by NumPy alone: python docs/numpy_inference.py model.npz images.npz"""

import json
import sys

import numpy as np


def windows(x, window, strides, padding, dilation, fill):  # -> (batch, places ..., channels, pixels of a window)
    x = np.pad(x, ((0, 0), *padding, (0, 0)), constant_values=fill)
    reach, axes = [(k - 1) * d + 1 for k, d in zip(window, dilation)], range(1, 1 + len(window))
    x = np.lib.stride_tricks.sliding_window_view(x, reach, tuple(axes))
    places, pixels = ([slice(None, None, step) for step in steps] for steps in (strides, dilation))
    x = x[(slice(None), *places, slice(None), *pixels)]
    return x.reshape(*x.shape[: 2 + len(window)], -1)


def conv(x, kernel, groups, **geometry):
    patches = np.split(windows(x, kernel.shape[:-2], fill=0, **geometry), groups, -2)
    kernels = np.split(kernel.reshape(-1, *kernel.shape[-2:]), groups, -1)
    return np.concatenate([np.tensordot(p, k, ((-1, -2), (0, 1))) for p, k in zip(patches, kernels)], -1)


OPERATIONS = {name: function for name, function in vars(np).items() if isinstance(function, np.ufunc)}
OPERATIONS |= {function.__name__: function for function in (conv, np.where, np.pad, np.transpose, np.tile, np.float16)}
OPERATIONS |= {f.__name__: lambda x, axis, f=f: f(x, tuple(axis)) for f in (np.sum, np.max, np.min)}
OPERATIONS |= {
    "sign": lambda x: np.where(x < 0, np.float32(-1), np.float32(1)),
    "threshold": lambda x, threshold, direction: np.where(x >= threshold, direction, -direction),
    "max_pool": lambda x, **geometry: windows(x, fill=-np.inf, **geometry).max(-1),
    "sum_pool": lambda x, **geometry: windows(x, fill=0, **geometry).sum(-1),
    "reshape": lambda x, shape: np.reshape(x, shape),
    "concatenate": lambda *parts, axis: np.concatenate(parts, axis),
    "slice": lambda x, ranges: x[(slice(None), *(slice(*r) for r in ranges))],
    "bfloat16": lambda x: ((bits := x.view(np.uint32)) + (bits >> 16 & 1) + 0x7FFF & 0xFFFF0000).view(np.float32),
    "einsum": lambda x, y, subscripts: np.einsum(subscripts, x, y, optimize=True),
}


def logits(network, images):
    values = {k: x.astype(np.float32) for k, x in {**network, "images": images}.items() if k != "steps"}
    for step in json.loads(str(network["steps"])):
        inputs = [values[i] if isinstance(i, str) else np.float32(i) for i in step["inputs"]]
        values[step["output"]] = np.asarray(OPERATIONS[step["op"]](*inputs, **step["options"]), np.float32)
    return values["logits"]


if __name__ == "__main__":
    network, test = (dict(np.load(path)) for path in sys.argv[1:])
    batches = [slice(start, start + 100) for start in range(0, len(test["images"]), 100)]
    correct = [logits(network, test["images"][batch]).argmax(1) == test["labels"][batch] for batch in batches]
    print(f"{100 * np.concatenate(correct).mean():.2f} % of {len(test['images'])} images")
