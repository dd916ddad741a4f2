r"""What a network costs: bits of weights, multiply-accumulates, FLOPs; counted in its traced computation.

The computation is traced for inference and never run: no array is allocated, nothing is compiled.  What the layers mark
as codes is counted as codes, everything else as real numbers, whatever module it is in.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
from jax import ShapeDtypeStruct

from bnn_jax.checks import require
from bnn_jax.errors import UsageError, unknown_name
from bnn_jax.outputs import apply_network, init_network, outputs_of
from bnn_jax.packed.freezing import threshold_chains
from bnn_jax.tracing.kernel_uses import Inference, Use, bases_of, bits_of, classifier_of, fan_in, inference
from bnn_jax.tracing.trace import Trace, multiply_accumulates, trace
from bnn_jax.training.config import Config, ModelConfig
from bnn_jax.training.experiment import make_model
from bnn_jax.training.validation import validate

REAL_BITS = 32
WORD_BITS = 32


class Macs(NamedTuple):
    """Multiply-accumulates by the codes of their factors.

    Attributes:
      full_precision: a factor at least is a real number.
      binary: both factors have two values.
      ternary: one has three values, the other two.
      multibit: all others, of m and k bits.
      bit_products: those of the last three in products of single bits: 1, 2 and m k each.

    A sum of codes, their product with codes that are all the same, is none.
    """

    full_precision: int = 0
    binary: int = 0
    ternary: int = 0
    multibit: int = 0
    bit_products: int = 0

    @property
    def total(self) -> int:
        return self.full_precision + self.binary + self.ternary + self.multibit

    @property
    def kind(self) -> str:
        """What they are, in words: "binary", or several joined by a plus."""
        names = {name: name.replace("_", "-") for name in self._fields[:-1]}
        return " + ".join(names[name] for name in names if getattr(self, name)) or "none"

    @property
    def flops(self) -> float:
        """full_precision + bit_products / 64: a word of 64 binary products counts as one operation, ternary twice."""
        return self.full_precision + self.bit_products / 64


class Layer(NamedTuple):
    """A kernel, what belongs to it, and the products that it takes part in.

    Attributes:
      name: path of the kernel among the variables, as "stage1_block1/conv1/latent_kernel"; where there is none, as
        for the map K of XNOR-Net, that of the module.
      shape: of the kernel.
      weights: how many.
      weight_bits: of each: ceil(log2 values) summed over the bases of its codes, 32 for a real number.
      words: uint32 words of the kernel in a packed file.
      biases: real numbers beside the kernel, as many as features.
      analytic_scales: scales of the codes that are computed from the kernel, in real numbers.
      learned_scales: scales of the codes that are parameters or states themselves.
      macs: of one pass.
      convolution: whether the kernel is one of a convolution, or a matrix.
      classifier: the last product before the first output.
    """

    name: str
    shape: tuple[int, ...]
    weights: int
    weight_bits: int
    words: int
    biases: int
    analytic_scales: int
    learned_scales: int
    macs: Macs
    convolution: bool
    classifier: bool

    @property
    def scales(self) -> int:
        return self.analytic_scales + self.learned_scales


class Convention(NamedTuple):
    """What of a network is counted; papers differ, and few say so.  The weights themselves always are."""

    classifier_bias: bool = True
    """Of the last layer."""
    biases: bool = True
    """Of the other layers."""
    batch_norm: bool = True
    """Two numbers a channel."""
    scales: bool = True
    """Of binary kernels."""
    other: bool = True
    """Thresholds, slopes, whatever else inference needs."""
    classifier_macs: bool = True
    """The operations of the last layer."""


EVERYTHING = Convention()


class Account(NamedTuple):
    """The costs of a network in inference.

    Attributes:
      layers: in the order of the computation.
      batch_norm: scale and shift of each normalized channel, into which statistics and parameters fold.
      other: all other numbers that inference needs, by path: thresholds, slopes, levels of activations.
      folded: numbers among these that a packed file does without, because a threshold a channel takes the place of a
        layer's scales and bias and of the normalization behind it.
    """

    layers: tuple[Layer, ...]
    batch_norm: int
    other: dict[str, int]
    folded: int = 0

    def weights(self, bits: int) -> int:
        """How many weights have so many bits."""
        return sum(layer.weights for layer in self.layers if layer.weight_bits == bits)

    @property
    def binary_weights(self) -> int:
        return self.weights(1)

    @property
    def full_precision_weights(self) -> int:
        return self.weights(REAL_BITS)

    @property
    def quantized_weights(self) -> dict[int, int]:
        """Bits a weight -> how many, of all that are codes."""
        found = sorted({layer.weight_bits for layer in self.layers if layer.weights} - {REAL_BITS})
        return {bits: self.weights(bits) for bits in found}

    @property
    def biases(self) -> int:
        return sum(layer.biases for layer in self.layers)

    @property
    def analytic_scales(self) -> int:
        return sum(layer.analytic_scales for layer in self.layers)

    @property
    def learned_scales(self) -> int:
        return sum(layer.learned_scales for layer in self.layers)

    @property
    def convolution_bits(self) -> int:
        """Bits of the convolutions' weights alone, without biases and scales."""
        return sum(layer.weights * layer.weight_bits for layer in self.layers if layer.convolution)

    def macs(self, convention: Convention = EVERYTHING) -> Macs:
        """Of all layers, or of all but the classifier."""
        counted = (layer.macs for layer in self.layers if convention.classifier_macs or not layer.classifier)
        return Macs(*map(sum, zip(Macs(), *counted)))

    def flops(self, convention: Convention = EVERYTHING) -> float:
        """Full-precision MACs + binary MACs / 64 + ternary MACs / 32; m x k bits count m k / 64 each."""
        return self.macs(convention).flops

    def bits(self, convention: Convention = EVERYTHING) -> int:
        """Storage: bits of the codes + 32 for each real number that `convention` counts."""
        weights = sum(layer.weights * layer.weight_bits for layer in self.layers)
        return weights + REAL_BITS * self._numbers(convention)

    def megabits(self, convention: Convention = EVERYTHING) -> float:
        """Storage in Mbit of 10^6 bits."""
        return self.bits(convention) / 1e6

    def mebibytes(self, convention: Convention = EVERYTHING) -> float:
        """Storage in MiB of 2^20 bytes."""
        return self.bits(convention) / 8 / 2**20

    def payload_bytes(self) -> int:
        r"""Size of the packed file without its header: 4 (words + numbers).

        words    for each filter of a quantized kernel: bits a weight * ceil(fan-in / 32); a real weight is one word
        numbers  biases, scales, two a normalized channel, and all others, as float32; a threshold a channel, of 32 bits
                 too, where that is all that is left of a layer's scales and bias and of its normalization
        """
        return 4 * (sum(layer.words for layer in self.layers) + self._numbers(EVERYTHING) - self.folded)

    def _numbers(self, convention: Convention) -> int:
        classifier = sum(layer.biases for layer in self.layers if layer.classifier)
        return (
            convention.classifier_bias * classifier
            + convention.biases * (self.biases - classifier)
            + convention.batch_norm * self.batch_norm
            + convention.scales * (self.analytic_scales + self.learned_scales)
            + convention.other * sum(self.other.values())
        )


def account(function: Callable[..., Any], variables: Any, x: Any) -> Account:
    r"""Count what ``function(variables, x)`` stores and computes.

    Products  of convolutions and matrices count where a factor depends on x and the result on no dead end; a product of
              variables alone is done once and for all.  In a scan they count as often as it runs.
    Kernel    of a product: of the variables behind the factor that does not depend on x, the one named `latent_kernel`
              or `kernel`, else the largest.
    Codes     A kernel that reaches the outputs through the marks of quantizers alone is stored as codes and scales, and
              what else stands before those marks is not stored; every other variable that reaches an output is stored
              as float32.  What decides a branch or a loop, and nothing else, is not seen.
    Scales    those marked after the codes, unless they are constants.
    Bias      a variable beside the kernel, in the same module, with one value a filter.
    Batch     what has statistics in the collection "batch_stats" of `variables`; parameters of the same module belong
    norm      to it.

    Args:
      function: of the variables and the inputs, in inference; its first output is the one that the classifier makes.
      variables: pytree of arrays or shapes (`jax.eval_shape`), as Flax's {"params": ..., "batch_stats": ...}.
      x: inputs, arrays or shapes, with a batch of one: products of a whole batch are counted.

    >>> import jax.numpy as jnp
    >>> counted = account(lambda v, x: x @ v["w"], {"w": jnp.ones((3, 4))}, jnp.ones((1, 3)))
    >>> counted.full_precision_weights, counted.flops()
    (12, 12.0)
    """
    graph = inference(trace(function, variables, x, unroll=True))
    uses: dict[str, list[Use]] = {}
    for use in graph.uses:
        for name in use.kernels or (f"({use.product.operation.path})",):
            uses.setdefault(name, []).append(use)
    biases, batch_norm, other = _real_numbers(graph, uses)
    classifier = classifier_of(graph)
    layers = (_layer(graph, name, uses[name], biases.get(name, 0), name == classifier) for name in uses)
    return Account(tuple(layers), batch_norm, other)


def network_named(name: str | type, *, num_classes: int = 10, **settings: Any) -> Any:
    """The Flax module of a network, as published where the settings do not say otherwise.

    Args:
      name: in MODELS, package.module:Name, or a class of modules.
      num_classes: of the logits.
      **settings: what else :class:`bnn_jax.training.config.ModelConfig` has.

    Raises:
      UsageError: for a name or setting that is not known; the nearest is named.
    """
    for setting in settings:
        if setting not in ModelConfig.__dataclass_fields__:
            raise unknown_name("setting", setting, ModelConfig.__dataclass_fields__)
    # The other settings of a run do not matter here.
    config = Config(name=name, epochs=1, batch_size=1, model=ModelConfig(name=name, **settings))
    return make_model(validate(config).model, num_classes=num_classes)


def account_model(
    model: Any, image_shape: tuple[int, int, int], *, num_classes: int | None = None, **settings: Any
) -> Account:
    """:func:`account` of a network for one image, evaluated: ``model.apply(variables, images, train=False)``.

    Args:
      model: a Flax module; or its class, a name in MODELS or package.module:Name, which make one.
      image_shape: (height, width, channels).
      num_classes, **settings: of a network by name, see :func:`network_named`; 10 classes if nothing else is said.

    Raises:
      UsageError: for a name or setting that is not known, of which the nearest is named, and for settings of a module,
        which has them already.

    >>> account_model("lenet", (32, 32, 3), kernel_quantizer="binary").binary_weights
    2850
    """
    if isinstance(model, str | type):
        model = network_named(model, num_classes=10 if num_classes is None else num_classes, **settings)
    elif given := settings | ({} if num_classes is None else {"num_classes": num_classes}):
        name, value = next(iter(given.items()))
        rule, way = "is for a network by name", f"make the {type(model).__name__} with it"
        require(name, value, False, rule, way, error=UsageError)
    images = ShapeDtypeStruct((1, *image_shape), "float32")
    rngs = {"params": jax.random.key(0)}
    _, variables = jax.eval_shape(partial(init_network, model, rngs), images)
    found = account(lambda *arguments: tuple(outputs_of(apply_network(model, *arguments))), variables, images)
    layers = {layer.name.rpartition("/")[0]: layer for layer in found.layers}
    # Of the two numbers of a normalized channel the threshold takes the place of one.
    try:
        chains = threshold_chains(model, variables, image_shape)
    except ValueError:  # It cannot be packed, so that nothing is folded in a file of it.
        chains = ()
    thresholds = [layers[chain.layer] for chain in chains]
    return found._replace(folded=sum(layer.scales + layer.biases + layer.shape[-1] for layer in thresholds))


def as_dict(account: Account, convention: Convention = EVERYTHING) -> dict[str, Any]:
    """An account and its totals as plain JSON values; storage and FLOPs by `convention`, counts of everything."""
    layers = [layer._asdict() | {"macs": layer.macs._asdict()} for layer in account.layers]
    totals = {
        "quantized_weights": {str(bits): count for bits, count in account.quantized_weights.items()},
        "full_precision_weights": account.full_precision_weights,
        "biases": account.biases,
        "analytic_scales": account.analytic_scales,
        "learned_scales": account.learned_scales,
        "batch_norm": account.batch_norm,
        "other": account.other,
        "macs": account.macs()._asdict(),
        "payload_bytes": account.payload_bytes(),
        "convention": convention._asdict(),
        "megabits": account.megabits(convention),
        "mebibytes": account.mebibytes(convention),
        "flops": account.flops(convention),
    }
    return totals | {"layers": layers}


def _macs(use: Use, traced: Trace) -> Macs:
    count = multiply_accumulates(use.product.operation, traced.values) * use.product.operation.repeats
    marks = (use.inputs.mark, use.weights.mark)
    if None in marks:
        return Macs(full_precision=count)
    values = sorted(mark.values for mark in marks)
    if values[0] == 1:
        return Macs()
    kind = {(2, 2): "binary", (2, 3): "ternary"}.get(tuple(values), "multibit")
    return Macs(**{kind: count}, bit_products=count * math.prod(map(bits_of, values)))


def _layer(graph: Inference, name: str, uses: list[Use], biases: int, classifier: bool) -> Layer:
    # What meets several kernels at once is computed once: it counts with the first.
    macs = [_macs(use, graph.traced) for use in uses if name in use.kernels[:1] or not use.kernels]
    total = Macs(*map(sum, zip(Macs(), *macs)))
    convolution = uses[0].product.operation.primitive == "conv_general_dilated"
    if name not in graph.traced.arguments:
        return Layer(name, (), 0, REAL_BITS, 0, 0, 0, 0, total, convolution, classifier)
    shape = graph.traced.values[graph.traced.arguments[name]].shape
    weights, filter_size = math.prod(shape), fan_in(uses[0], graph.traced)
    bases = [] if name in graph.live else bases_of(graph, name, uses)
    bits = sum(base.bits for base in bases) if bases else REAL_BITS
    words = bits * (weights // filter_size) * math.ceil(filter_size / WORD_BITS) if bases else weights
    # In a scan a base holds the codes of one turn.
    scales = [(base.analytic, base.scales * max(1, weights // base.size)) for base in bases]
    analytic, learned = (sum(count for kind, count in scales if kind is wanted) for wanted in (True, False))
    return Layer(_name(name), shape, weights, bits, words, biases, analytic, learned, total, convolution, classifier)


def _real_numbers(graph: Inference, uses: dict[str, list[Use]]) -> tuple[dict[str, int], int, dict[str, int]]:
    """What inference needs besides kernels: biases by kernel, numbers of batch norm, all others by name."""
    arguments = {path: value for path, value in graph.traced.arguments.items() if path.startswith("0")}
    size = {path: math.prod(graph.traced.values[value].shape) for path, value in arguments.items()}
    module = {path: path.split("/")[2:-1] for path in size}
    statistics = {path for path in size if path.startswith("0/batch_stats/")}
    normalized = [module[path] for path in statistics]
    filters = {
        (path.rpartition("/")[0], size[path] // fan_in(uses[path][0], graph.traced)): path
        for path in uses
        if path in size
    }
    biases: dict[str, int] = {}
    other: dict[str, int] = {}
    batch_norm: dict[str, int] = {}
    for path in sorted(graph.live & size.keys() - uses.keys()):
        if module[path] in normalized:
            of_module = [(p in statistics, size[p]) for p in size.keys() - uses.keys() if module[p] == module[path]]
            counts = (sum(n for kind, n in of_module if kind is wanted) for wanted in (True, False))
            batch_norm["/".join(module[path])] = max(counts)
        elif beside := filters.get((path.rpartition("/")[0], size[path])):
            biases[beside] = biases.get(beside, 0) + size[path]
        else:
            other[_name(path)] = size[path]
    return biases, sum(batch_norm.values()), other


def _name(path: str) -> str:
    """Without the number of the argument and the collection of parameters."""
    return path.removeprefix("0/").removeprefix("params/")
