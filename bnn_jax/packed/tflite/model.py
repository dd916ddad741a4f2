r"""A trained network as a `.tflite` file for the Larq Compute Engine, written without TensorFlow.

The network is traced once.  What depends on its variables alone becomes constants: quantized kernels, the gains and
offsets of batch norms.  Every other operation becomes one of TensorFlow Lite's, and a convolution or a dense layer of
-1/+1 inputs and a -1/+1 kernel becomes

    LceQuantize -> LceBconv2d

with the kernel packed 32 codes a word.  Sums of codes stay integers and scales are multiplied behind them, as in
training, so that both programs round in the same places.
"""

import os
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import JaxprEqn

from bnn_jax.files import write_atomically
from bnn_jax.finite import require_finite
from bnn_jax.outputs import network_logits
from bnn_jax.packed.freezing import TRAIN_AGAIN
from bnn_jax.packed.tflite.operations import RULES, as_tensor
from bnn_jax.packed.tflite.products import Call, Real
from bnn_jax.packed.tflite.schema import Graph, to_bytes
from bnn_jax.paths import local_path, require_ending
from bnn_jax.tracing.interpret import Unsupported, evaluate, interpret


class _Refused(NamedTuple):
    """The result of an operation that the file cannot hold: an error if the network's output needs it."""

    message: str
    shape: tuple[int, ...] = ()


def write_tflite(
    path: str | os.PathLike[str],
    model: nn.Module,
    variables: Mapping[str, Any],
    image_shape: Sequence[int],
) -> None:
    """Write a network as a `.tflite` file, which the interpreter of the Larq Compute Engine runs.

    The file has one input, a normalized image (1, height, width, channels) in float32, and one output, the logits.  It
    takes networks whose quantized inputs are -1/+1 codes that meet -1/+1 kernels: XNOR-Net, Bi-Real Net, ReActNet,
    ABC-Net, IR-Net and others, with any scales, paddings, strides and dilations.  Layers in full precision, and those
    that quantize weights alone, become float ones.  There is no operator for ternary, 0/1 and k-bit inputs.  A denormal
    number becomes zero in the file; where the engine computes one, of an activation, its code may be another than here.

    Args:
      path: of the file; it is there whole or not at all.
      model: as :func:`bnn_jax.packed.freeze` takes it.
      variables: of the trained network, not frozen.
      image_shape: (height, width, channels).

    Raises:
      ValueError: for packed variables, another `image_shape`, a number that is not finite, or an operation that has no
        operator; the layer is named.
      UsageError: where the package flatbuffers is missing, or the name of the file ends as that of another format.
      OSError: what the file system said; `path` is as it was.

    Reference: Bannink et al., Larq Compute Engine: Design, Benchmark, and Deploy State-of-the-Art Binarized Neural
    Networks, 2020, arXiv:2011.09398.
    """
    path = local_path("path", path)
    require_ending("path", path, ".tflite")
    write_atomically(path, tflite_bytes(model, variables, image_shape))


def tflite_bytes(model: nn.Module, variables: Mapping[str, Any], image_shape: Sequence[int]) -> bytes:
    """What :func:`write_tflite` writes."""
    if "packed" in variables:
        raise ValueError("`variables` (with 'packed') are frozen; give those of training, from which this file is made")
    if len(image_shape) != 3 or min(image_shape) < 1:
        raise ValueError(f"`image_shape` (={tuple(image_shape)}) must be (height, width, channels), as (32, 32, 3)")
    require_finite("variables", variables, TRAIN_AGAIN)
    images = jax.ShapeDtypeStruct((1, *image_shape), jnp.float32)
    jaxpr = jax.make_jaxpr(partial(network_logits, model, variables))(images)
    graph = Graph()
    image = graph.tensor(images.shape, "float32", "image")
    (logits,) = interpret(jaxpr, [Real(image, images.shape)], partial(_results, graph))
    if isinstance(logits, _Refused):
        raise ValueError(logits.message)
    return to_bytes(graph, inputs=[image], outputs=[as_tensor(graph, logits)], description=type(model).__name__)


def _results(graph: Graph, equation: JaxprEqn, inputs: list[Any], path: str) -> list[Any]:
    if all(isinstance(value, np.ndarray) for value in inputs):
        return evaluate(equation, inputs)
    for value in inputs:
        if isinstance(value, _Refused):
            return [value] * len(equation.outvars)
    graph.path = path
    try:
        return [_convert(graph, equation, inputs)]
    except Unsupported as cause:
        return [_Refused(_sentence(equation, cause, path))] * len(equation.outvars)


def _convert(graph: Graph, equation: JaxprEqn, inputs: list[Any]) -> Any:
    name = equation.primitive.name
    if name not in RULES or len(equation.outvars) != 1:
        raise Unsupported("")
    aval = equation.outvars[0].aval
    return RULES[name](graph, Call(name, equation.params, tuple(aval.shape), str(aval.dtype)), *inputs)


def _sentence(equation: JaxprEqn, cause: Unsupported, path: str) -> str:
    what = " ".join(filter(None, (f"the operation {equation.primitive.name!r}", str(cause))))
    return (
        f"`model` has {what} at {path or 'its top'!r}, for which the Larq Compute Engine's files have no operator; "
        "export to .bnn.safetensors instead"
    )
