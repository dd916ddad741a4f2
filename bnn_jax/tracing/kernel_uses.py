"""Which variables a computation uses as kernels, in which products, and what of them it needs in inference."""

import math
from collections.abc import Callable, Iterable
from typing import NamedTuple

from bnn_jax.quantizers import Mark, read_mark
from bnn_jax.tracing.trace import Operand, Operation, Product, Trace, products
from bnn_jax.types import LATENT_KERNEL


def bits_of(values: int) -> int:
    """Bits that tell so many values apart.

    >>> bits_of(2), bits_of(3), bits_of(16), bits_of(17)
    (1, 2, 4, 5)
    """
    return math.ceil(math.log2(values))


class KernelCodes(NamedTuple):
    """Codes that a layer has marked.

    Attributes:
      kernel: path of the latent weights.
      size: how many codes.
      bits: of one.
      scales: how many numbers are in their scale; 0 for a constant.
      analytic: the scale is computed from the kernel.
    """

    kernel: str
    size: int
    bits: int
    scales: int = 0
    analytic: bool = False


class Use(NamedTuple):
    """A product of the inputs that takes part in inference.

    Attributes:
      product: as traced.
      inputs, weights: its factors; `weights` is the one that the inputs do not decide, the right one if they decide
        both.
      kernels: paths of the kernels behind `weights`; none for a constant and for a factor that the inputs decide.
      codes: the marks behind `weights`, by the values they name.
    """

    product: Product
    inputs: Operand
    weights: Operand
    kernels: tuple[str, ...]
    codes: frozenset[int]


class Inference(NamedTuple):
    """What happens to the variables of a function of (variables, inputs).

    Attributes:
      traced: the function.
      uses: its products, in order.
      codes: value -> the codes of a kernel that are marked there.
      origin: value -> the marks of codes from which it is computed, each a bit.
      live: paths of the variables that reach the outputs otherwise than through the marks of kernels.
    """

    traced: Trace
    uses: tuple[Use, ...]
    codes: dict[int, KernelCodes]
    origin: dict[int, int]
    live: frozenset[str]


def inference(traced: Trace) -> Inference:
    """The :class:`Inference` of a traced function of (variables, inputs)."""
    arguments = {value: 1 << i for i, value in enumerate(traced.arguments.values())}
    paths, behind = tuple(traced.arguments), _flow(traced, arguments)
    from_inputs = sum(1 << i for i, path in enumerate(paths) if not path.startswith("0"))
    marks = [(operation.outputs[0], mark) for operation in traced.operations if (mark := _mark(operation))]

    def variables(value: int) -> frozenset[str]:
        bits = behind.get(value, 0) & ~from_inputs
        return frozenset(path for i, path in enumerate(paths) if bits >> i & 1)

    fixed = [(v, mark) for v, mark in marks if mark.place == "kernel_quantizer" and not behind.get(v, 0) & from_inputs]
    codes = _kernel_codes(traced, fixed, variables)
    origin = _flow(traced, {v: 1 << i for i, (v, mark) in enumerate(marks) if mark.values is not None})
    index = {i: v for i, (v, _) in enumerate(marks) if v in codes}
    needed = _reached(traced, traced.outputs)
    live = _reached(traced, traced.outputs, stops={value for value, _ in fixed})

    def use(product: Product) -> Use:
        depends = {o.value: bool(behind.get(o.value, 0) & from_inputs) for o in (product.right, product.left)}
        weights, inputs = sorted((product.right, product.left), key=lambda operand: depends[operand.value])
        of_weights = frozenset(v for i, v in index.items() if origin.get(weights.value, 0) >> i & 1)
        kernels = {codes[v].kernel for v in of_weights} or {_kernel(traced, variables(weights.value))} - {None}
        return Use(product, inputs, weights, () if depends[weights.value] else tuple(sorted(kernels)), of_weights)

    uses = (use(p) for p in products(traced) if not needed.isdisjoint(p.operation.outputs))
    uses = tuple(use for use in uses if behind.get(use.inputs.value, 0) & from_inputs)
    return Inference(traced, uses, codes, origin, frozenset(p for p, v in traced.arguments.items() if v in live))


def _mark(operation: Operation) -> Mark | None:
    return read_mark(operation.params["name"]) if operation.primitive == "name" else None


def _flow(traced: Trace, own: dict[int, int]) -> dict[int, int]:
    """value -> the bits of all that it is computed from; a value that has its own passes on these alone."""
    bits = dict(own)
    for operation in traced.operations:
        union = 0
        for value in operation.inputs:
            union |= bits.get(value, 0)
        bits.update((value, own.get(value, union)) for value in operation.outputs)
    return bits


def _reached(traced: Trace, ends: Iterable[int], *, stops: Iterable[int] = ()) -> set[int]:
    """The values from which `ends` are computed, as far back as `stops`."""
    reached, stops = set(ends), set(stops)
    for operation in reversed(traced.operations):
        if not reached.isdisjoint(operation.outputs) and stops.isdisjoint(operation.outputs):
            reached.update(operation.inputs)
    return reached


def _kernel(traced: Trace, paths: Iterable[str]) -> str | None:
    """Which of these variables is the kernel: by its name, else by its size."""
    order = ("kernel", LATENT_KERNEL)
    size = {path: math.prod(traced.values[traced.arguments[path]].shape) for path in paths}
    named = {path: order.index(name) if (name := path.split("/")[-1]) in order else -1 for path in paths}
    return max(sorted(paths), key=lambda path: (named[path], size[path]), default=None)


def _kernel_codes(
    traced: Trace, marks: list[tuple[int, Mark]], variables: Callable[[int], frozenset[str]]
) -> dict[int, KernelCodes]:
    """value -> the codes that are marked there; a layer marks a scale right after its codes."""
    found: dict[int, KernelCodes] = {}
    last = None
    for value, mark in marks:
        size, behind = math.prod(traced.values[value].shape), variables(value)
        if mark.values is not None:
            last = value
            kernel = _kernel(traced, behind)
            if kernel is not None:
                found[value] = KernelCodes(kernel, size, bits_of(mark.values))
        elif last in found and behind:
            found[last] = found[last]._replace(scales=size, analytic=found[last].kernel in behind)
    return found


def fan_in(use: Use, traced: Trace) -> int:
    """The weights that one output of a product is a sum over."""
    operation, shape = use.product.operation, traced.values[use.weights.value].shape
    if operation.primitive == "dot_general":
        side = 0 if use.weights is use.product.left else 1
        return math.prod(shape[axis] for axis in operation.params["dimension_numbers"][0][side])
    return math.prod(shape) // shape[operation.params["dimension_numbers"].rhs_spec[0]]


def bases_of(graph: Inference, kernel: str, uses: list[Use]) -> list[KernelCodes]:
    """The codes of a kernel in one call; a layer that is called twice marks them twice, and they meet other inputs."""
    meeting: dict[tuple[bool, int], set[int]] = {}
    for use in uses:
        inputs = (True, graph.origin[use.inputs.value]) if use.inputs.mark else (False, use.inputs.value)
        meeting.setdefault(inputs, set()).update(v for v in use.codes if graph.codes[v].kernel == kernel)
    return [graph.codes[value] for value in sorted(max(meeting.values(), key=len))]


def classifier_of(graph: Inference) -> str | None:
    """The kernel of the last product that the first output is computed from."""
    leading = _reached(graph.traced, graph.traced.outputs[:1])
    last = [use for use in graph.uses if not leading.isdisjoint(use.product.operation.outputs)][-1:]
    return last[0].kernels[0] if last and last[0].kernels else None
