"""Names for the arrays and functions that travel between the stages.  Nothing here executes."""

from collections.abc import Callable, Mapping
from typing import Any, Protocol, TypeAlias

from jaxtyping import Array, Float, Integer, UInt8

Key: TypeAlias = Array
"""A `jax.random.key`."""

Params: TypeAlias = Any
"""A pytree of parameters, normally nested dicts of float arrays."""

Images: TypeAlias = UInt8[Array, "batch *spatial channels"]
Labels: TypeAlias = Integer[Array, "batch"]
Logits: TypeAlias = Float[Array, "batch classes"]
BatchLabels: TypeAlias = Integer[Array, "batch *tokens"]
"""One label an example, or one for each of its tokens."""
BatchLogits: TypeAlias = Float[Array, "batch *tokens classes"]

Schedule: TypeAlias = Callable[[Any], Any]
"""step -> value; jit-compatible, as in optax."""

Metrics: TypeAlias = Mapping[str, Array]


EstimatorFunction: TypeAlias = Callable[..., Float[Array, "..."]]
"""A step function with a chosen derivative: (x, **parameters) -> integer codes of x's shape and dtype."""


class LossFunction(Protocol):
    """(logits, labels) -> one loss for each example."""

    def __call__(self, logits: Logits, labels: Labels) -> Float[Array, "batch"]: ...


LATENT_KERNEL = "latent_kernel"
"""Name of every parameter that holds latent weights; a full-precision layer names its weights `kernel`."""
