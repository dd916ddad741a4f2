r"""The weights, scales and thresholds of a packed network as NumPy arrays by the names of its layers.

Beside the arrays there is the order of operations, so that a program of forty lines computes the logits with NumPy
alone: docs/numpy_inference.py.
"""

import io
import json
import math
import os
import re
from collections.abc import Mapping
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jax import ShapeDtypeStruct
from jaxtyping import Array, Num

from bnn_jax.bitops.planes import PackedKernel, unpack_codes
from bnn_jax.files import write_atomically
from bnn_jax.finite import require_finite
from bnn_jax.layers import BatchNorm, BinaryConv, BinaryDense
from bnn_jax.layers.frozen import PACKED, code_sets
from bnn_jax.layers.geometry import spatial_rank
from bnn_jax.layers.norm import affine
from bnn_jax.layers.operands import InputBase, Phase, input_bases, kernel_for
from bnn_jax.packed.calls import input_of
from bnn_jax.packed.freezing import TRAIN_AGAIN
from bnn_jax.packed.model import PackedModel
from bnn_jax.packed.steps import Steps
from bnn_jax.paths import local_path, require_ending
from bnn_jax.precision import promoted
from bnn_jax.quantizers import Quantized

STEPS = "steps"
"""The key of the steps, beside the names of arrays."""

IMAGES, LOGITS = "images", "logits"
"""What the steps start from, uint8 images (batch, height, width, channels), and what they end in."""


def arrays(packed: PackedModel) -> dict[str, np.ndarray]:
    r"""The arrays of a packed network by name, ready for ``np.savez(file, **arrays(packed))``.

    `LAYER` is the path of a layer, as stage1_block2/conv1:

      LAYER/kernel     int8      codes of a quantized kernel, as -1 and +1 (int16 where a code needs it)
                       float32   weights of a layer in full precision
      LAYER/scale      float32   (features,) or (): the weights are  kernel * scale; without one the scale is 1
      LAYER/bias       float32   (features,)
      LAYER/gain, LAYER/offset            float32  (channels,): a batch norm is  gain x + offset
      LAYER/threshold, LAYER/direction    int32, int8  (channels,): a batch norm and the sign behind it are
                       direction if x >= threshold else -direction,  x the integer sums of the layer before
      mean, std        float32   (channels,): of the images, in units of 0..255
      steps            text      see below

    and learned parameters of activations and quantizers by their own names.  A kernel of several bases, whose sum is
    meant, has kernel1, scale1, kernel2, scale2, ...  Kernels are HWIO, (height, width, inputs, features), or (inputs,
    features) of dense layers; ``kernel.transpose(3, 2, 0, 1)`` is OIHW.  Images are NHWC.

    `steps` is a JSON list of  {"output", "op", "inputs", "options", "layer"}:  inputs are names of arrays or of earlier
    outputs, or numbers; the first is made from "images", uint8 (batch, height, width, channels), the last is "logits".
    Residual connections are steps "add".  The operations, all of which broadcast as in NumPy:

      conv        cross-correlation; `strides`, `padding` ((low, high) an axis, with zeros), `dilation`, `groups`.  A
                  layer whose borders are +1 or -1 has a step "pad" before it.
      matmul, einsum (`subscripts`)
      sign        -1 if x < 0 else +1
      threshold   (x, threshold, direction), as above
      bfloat16, float16     the nearest number of that dtype, a tie to the even one: where the network rounds to it
      max_pool, sum_pool    `window`, `strides`, `padding`, which counts as -inf or 0
      slice       `ranges`: [start, stop, step] of each axis but the first
      reshape     `shape`, with -1 for the images
      all others  as in NumPy: add, multiply, maximum, where, pad, sum, concatenate, transpose, ...

    Args:
      packed: of :func:`bnn_jax.packed.load`, or made of the packed variables of :func:`bnn_jax.packed.freeze`.

    Raises:
      ValueError: for an operation that is none of these; the layer is named.  If a number is not finite, or a variable
        has the name of a step.
    """
    require_finite("packed", packed.variables, TRAIN_AGAIN)
    named, real = _named(packed)
    if taken := [name for name in named if name in (IMAGES, LOGITS, STEPS) or re.fullmatch(r"(x|constant)\d+", name)]:
        raise ValueError(f"`packed` has a variable {taken[0]!r}, as a step may be called; rename it")
    batch = _no_divisor([*packed.metadata["image_shape"], *(n for array in named.values() for n in array.shape)])
    images = ShapeDtypeStruct((batch, *packed.metadata["image_shape"]), jnp.uint8)
    shapes = {name: ShapeDtypeStruct(array.shape, array.dtype) for name, array in named.items()}

    codes = _unused_dtype(packed, images)

    def logits(arrays, images):
        variables = unflatten_dict({path: arrays[name] for path, name in real.items()})
        whole = packed.variables | variables
        run = PackedModel(packed.model, whole, {**packed.metadata, "mean": arrays["mean"], "std": arrays["std"]})
        with nn.intercept_methods(_Frozen(packed.variables[PACKED], arrays, codes)):
            return run.apply(whole, images)

    jaxpr = jax.make_jaxpr(logits)(shapes, images)
    steps = Steps(jaxpr, [*sorted(shapes), IMAGES], LOGITS, batch)
    text = json.dumps(steps.steps)
    used = {i for step in steps.steps for i in step["inputs"] if isinstance(i, str)}
    found = {name: _as_float32(array) for name, array in (named | steps.constants).items() if name in used}
    return found | {STEPS: np.array(text)}


def _as_float32(array: np.ndarray) -> np.ndarray:
    """Real numbers in the dtype that NumPy and C read."""
    return array.astype(np.float32) if jnp.issubdtype(array.dtype, jnp.floating) else array


def _unused_dtype(packed: PackedModel, images: ShapeDtypeStruct) -> Any:
    """A dtype that nothing in the network has, by which the codes that thresholds make are known."""
    text = str(jax.make_jaxpr(packed.apply)(packed.variables, images))
    unused = [dtype for name, dtype in (("f16", jnp.float16), ("bf16", jnp.bfloat16)) if f":{name}[" not in text]
    if not unused:
        raise ValueError("`packed` computes in float16 and in bfloat16; give its layers one `dtype`")
    return unused[0]


def _no_divisor(sizes: list[int]) -> int:
    """A number of images that no size is a multiple of."""
    return next(n for n in (1009, 1013, 1019, *range(2**20, 2**21)) if all(size % n for size in sizes))


def _named(packed: PackedModel) -> tuple[dict[str, np.ndarray], dict[tuple[str, ...], str]]:
    """name -> array; and path of a variable outside "packed" -> its name."""
    named = {name: np.asarray(packed.metadata[name], np.float32) for name in ("mean", "std")}
    is_leaf = lambda _, value: isinstance(value, PackedKernel)
    for path, value in flatten_dict(packed.variables[PACKED], is_leaf=is_leaf).items():
        layer = "/".join(path[:-1])
        if isinstance(value, PackedKernel):
            named |= {_join(layer, name): array for name, array in _of_kernel(value).items()}
        elif path[-1] == "threshold":
            doubled = np.asarray(value)
            named[_join(layer, "threshold")] = doubled >> 1
            named[_join(layer, "direction")] = (1 - 2 * (doubled & 1)).astype(np.int8)
        else:
            named["/".join(path)] = np.asarray(value)
    rest = {k: v for k, v in packed.variables.items() if k != PACKED}
    real = {path: "/".join(path[1:]) for path in flatten_dict(rest)}
    if len({*named, *real.values()}) < len(named) + len(real):
        raise ValueError("`packed` has two variables of one name in different collections; rename one of them")
    flat = flatten_dict(rest)
    return named | {name: np.asarray(flat[path]) for path, name in real.items()}, real


def _join(layer: str, name: str) -> str:
    return f"{layer}/{name}" if layer else name


def _numbered(kernel: PackedKernel) -> list[str]:
    """What is behind the names of each base's arrays."""
    return [""] if len(kernel.bases) == 1 else [str(number) for number in range(1, len(kernel.bases) + 1)]


def _of_kernel(kernel: PackedKernel) -> dict[str, np.ndarray]:
    found = {}
    for base, number in zip(kernel.bases, _numbered(kernel)):
        dtype = np.int8 if max(map(abs, base.values)) < 128 else np.int16
        found[f"kernel{number}"] = np.asarray(unpack_codes(base, kernel.shape)).astype(dtype)
        scale = np.float32(base.constant) if base.scale is None else np.asarray(base.scale)
        if base.scale is not None or base.constant != 1:
            found[f"scale{number}"] = scale.reshape(-1) if scale.size > 1 else scale.reshape(())
    return found


@partial(jax.jit, static_argnames="dtype")
def threshold(
    x: Num[Array, "*leading channels"], threshold: Num[Array, "channels"], direction: Num[Array, "channels"], dtype: Any
) -> Num[Array, "*leading channels"]:
    """Codes from integer sums: direction if x >= threshold else -direction."""
    shape = (1,) * (x.ndim - 1) + (-1,)
    reached = x >= threshold.astype(x.dtype).reshape(shape)
    return jnp.where(reached, direction.reshape(shape), -direction.reshape(shape)).astype(dtype)


class _Frozen:
    """Calls the layers of a frozen network on named arrays, on which they multiply codes as numbers."""

    def __init__(self, packed: Mapping[str, Any], arrays: Mapping[str, Array], codes: Any):
        is_leaf = lambda _, value: isinstance(value, PackedKernel)
        self.packed = {"/".join(p): v for p, v in flatten_dict(packed, is_leaf=is_leaf).items()}
        self.arrays = arrays
        self.codes = codes

    def __call__(self, call, arguments, options, context):
        module = context.module
        path = "/".join(module.path)
        if context.method_name != "__call__":
            return call(*arguments, **options)
        if isinstance(module, BinaryConv | BinaryDense) and module.kernel_quantizer is not None:
            return self._product(module, path, *arguments, **options)
        if isinstance(module, BatchNorm):
            x = input_of(arguments, options)
            if _join(path, "threshold") in self.arrays:
                given = (self.arrays[_join(path, name)] for name in ("threshold", "direction"))
                return threshold(x, *given, dtype=self.codes)
            return affine(x, *(self.arrays[_join(path, name)] for name in ("gain", "offset")))
        return call(*arguments, **options)

    def _product(self, layer, path, x, *, train=False, progress=1.0):
        """What :func:`bnn_jax.layers.packed_call.packed_call` does, on numbers."""
        kernel, phase, axes, geometry = self.packed[_join(path, "kernel")], Phase(train, progress), 1, ()
        if isinstance(layer, BinaryConv):
            axes = 1 + (spatial_rank(layer) or max(1, x.ndim - 2))
            geometry = (layer.geometry(x.shape[-axes:-1]),)
        leading, x = x.shape[:-axes], x.reshape(math.prod(x.shape[:-axes]), *x.shape[-axes:])
        dtype = promoted(layer.dtype, jnp.dtype(jnp.float32))
        one = jnp.ones((), dtype)
        bases = []
        for number in _numbered(kernel):
            codes = self.arrays[_join(path, f"kernel{number}")].astype(dtype)
            scale = self.arrays.get(_join(path, f"scale{number}"), one)
            bases.append(Quantized(codes, scale.reshape((1,) * (codes.ndim - 1) + (-1,)) if scale.ndim else scale))
        if x.dtype == self.codes:
            x = x.astype(layer.dtype)
            inputs = [self._codes(layer, x, kernel)]
        else:
            inputs = input_bases(layer, x, phase)
        if kernel.integers:
            inputs = [base._replace(scale=one) for base in inputs]
        y = sum(layer.product(a, w, *geometry) for a in inputs for w in kernel_for(layer, inputs, tuple(bases)))
        if not kernel.integers:
            y = layer.finished(y, x, phase, *geometry)
        return y.reshape(*leading, *y.shape[1:])

    def _codes(self, layer, x, kernel):
        """The -1 and +1 of a threshold as the two codes of the layer's quantizer."""
        ((low, high),) = code_sets(layer.input_quantizer, 1)
        codes = x if (low, high) == (-1, 1) else (low + high) / 2 + (high - low) / 2 * x
        return InputBase(codes, jnp.asarray(kernel.input_scale, layer.dtype), (low, high))


def write_npz(path: str | os.PathLike[str], packed: PackedModel) -> None:
    """Write :func:`arrays` into one compressed file, which ``numpy.load`` reads.

    Raises:
      ValueError: as :func:`arrays`.
      UsageError: if the name of the file ends as that of another format.
    """
    path = local_path("path", path)
    require_ending("path", path, ".npz")
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **arrays(packed))
    write_atomically(path, buffer.getvalue())
