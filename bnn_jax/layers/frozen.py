"""What a layer does to be frozen and compared: its part in :func:`bnn_jax.packed.freeze` and `verify`."""

from collections.abc import Callable, Sequence

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array

from bnn_jax.bitops.paths import PATHS
from bnn_jax.bitops.planes import PackedBase, PackedKernel, Values, input_words, pack_codes
from bnn_jax.quantizers import Quantized, Quantizer

PACKED = "packed"
"""The collection of the variables that take the place of latent weights and normalizations."""

PRODUCTS = "products"
"""The collection into which layers put their codes and integer products, when it is mutable."""

TAKEN = "taken"
"""The collection into which packed layers put the number of their path in PATHS, when it is mutable."""

NOT_A_NUMBER = -(2**31)
"""What stands there for a code or a product that is not finite; none is so large."""


def is_freezing(module: nn.Module, train: bool) -> bool:
    """Whether this call is one of :func:`bnn_jax.packed.freeze`, which collects the packed variables."""
    # Where all collections are mutable, as in an initialization, the parameters are too.
    return module.is_mutable_collection(PACKED) and not module.is_mutable_collection("params") and not train


def is_recording(module: nn.Module) -> bool:
    """Whether this call is one of :func:`bnn_jax.packed.verify`, which collects codes and products."""
    return module.is_mutable_collection(PRODUCTS) and not module.is_mutable_collection("params")


def code_sets(quantizer: Quantizer | None, bases: int) -> list[Values]:
    """The code set of each of so many bases; () for real numbers."""
    if quantizer is None:
        return [()] * bases
    nested = quantizer.code_set and isinstance(quantizer.code_set[0], Sequence)
    return [tuple(values) for values in (quantizer.code_set if nested else [quantizer.code_set] * bases)]


def freeze_kernel(module: nn.Module, kernel: Sequence[Quantized], shape: tuple[int, ...]) -> None:
    """Put a layer's quantized kernel into the collection "packed".

    Raises:
      ValueError: if the kernel quantizer has real numbers in the place of codes.
    """
    sets = code_sets(module.kernel_quantizer, len(kernel))
    if () in sets:
        raise ValueError(
            f"`model` cannot be packed: the kernel quantizer of layer {'/'.join(module.path)!r} evaluates with real "
            "weights; choose one with codes"
        )
    packed = (PackedBase(pack_codes(base.codes, s), base.scale, s) for base, s in zip(kernel, sets, strict=True))
    module.put_variable(PACKED, "kernel", PackedKernel(tuple(packed), tuple(shape)))


def packed_kernel(module: nn.Module) -> PackedKernel | None:
    """The layer's packed kernel, if it is frozen."""
    return module.get_variable(PACKED, "kernel") if module.has_variable(PACKED, "kernel") else None


def is_frozen(module: nn.Module) -> bool:
    """Whether a layer inside this module is frozen."""
    return bool(module.variables.get(PACKED))


def scale_of(base: PackedBase, dtype: jnp.dtype) -> Array:
    """The scale of a packed base."""
    return jnp.asarray(base.constant if base.scale is None else base.scale, dtype)


def record(layer: nn.Module, codes: Array, values: Values, product: Callable[[], Array]) -> None:
    """Put packed input codes of `values` and their integer product into the collection "products", if it is mutable."""
    if values and is_recording(layer):
        layer.sow(PRODUCTS, "words", input_words(codes, values))
        layer.sow(PRODUCTS, "integers", _whole(product()))


def record_path(layer: nn.Module, path: str) -> None:
    """Put the number of a packed layer's path into the collection "taken", if it is mutable."""
    if layer.is_mutable_collection(TAKEN):
        layer.sow(TAKEN, "path", jnp.int32(PATHS.index(path)))


def record_kernel(layer: nn.Module, codes: Callable[[], Sequence[Array]]) -> None:
    """Put the codes of each base of a quantized kernel into the collection "products", if it is mutable."""
    if layer.kernel_quantizer is not None and is_recording(layer):
        layer.sow(PRODUCTS, "weights", tuple(map(_whole, codes())))


def _whole(x: Array) -> Array:
    return jnp.nan_to_num(x, nan=NOT_A_NUMBER, posinf=NOT_A_NUMBER, neginf=NOT_A_NUMBER).astype(jnp.int32)


def is_words(x: Array) -> bool:
    """Whether activations come as the packed codes that a normalization with thresholds returns."""
    return x.dtype == jnp.uint32
