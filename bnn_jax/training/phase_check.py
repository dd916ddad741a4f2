"""Whether a network tells its layers what their quantizers need to know of training."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import flax.linen as nn

from bnn_jax.layers import BinaryConv, BinaryDense


def phase_is_told() -> AbstractContextManager:
    """Around the call of a network that is to be trained: refuse a layer that is not told what its quantizers need.

    They would take every step for an evaluation at the end of training: schedules at their last value, states as they
    began, gradients as they are.

    Raises:
      ValueError: naming the layer and what it is to be called with.
    """
    return nn.intercept_methods(_intercept)


def _intercept(call: Callable, arguments: tuple, options: dict[str, Any], context: nn.module.InterceptorContext) -> Any:
    module = context.module
    if isinstance(module, BinaryConv | BinaryDense) and context.method_name == "__call__":
        for needed in _needs(module):
            if needed not in options:
                raise ValueError(
                    f"layer {'/'.join(module.path)!r} has quantizers that need `{needed}`, and is called without; let "
                    "the network take `train` and `progress` and hand them on: layer(x, train=train, progress=progress)"
                )
    return call(*arguments, **options)


def _needs(layer: BinaryConv | BinaryDense) -> set[str]:
    quantizers = [q for q in (layer.input_quantizer, layer.kernel_quantizer) if q is not None]
    wants = {wanted for quantizer in quantizers for wanted in quantizer.wants}
    trains = layer.gradient_quantizer is not None or any(q.init_state is not None for q in quantizers)
    return (wants & {"progress"}) | ({"train"} if trains or wants & {"train", "key"} else set())
