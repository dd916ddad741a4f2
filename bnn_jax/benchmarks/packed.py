"""How fast packed bits are: products, convolutions and whole networks, each beside its peers in the same process."""

import math
import os
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from bnn_jax.analysis.figures import COLOURS, drawing
from bnn_jax.analysis.provenance import installed_versions
from bnn_jax.analysis.tables import TEXT, Tables
from bnn_jax.bitops.bits import pack
from bnn_jax.bitops.conv import Geometry
from bnn_jax.bitops.matmul import WIDE_VECTORS
from bnn_jax.bitops.planes import PackedBase, conv_product, dense_product, pack_codes
from bnn_jax.models.build import build_model
from bnn_jax.outputs import logits_of
from bnn_jax.packed import PackedModel, freeze, save
from bnn_jax.paths import local_path
from bnn_jax.timing import interleaved_seconds, median_ms
from bnn_jax.training.progress import OnProgress, silent

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MATMULS = (
    (12544, 576, 64),
    (3136, 1152, 128),
    (784, 2304, 256),
    (196, 4608, 512),
    (1024, 4096, 4096),
    (64, 4096, 4096),
    (1, 4096, 4096),
)
"""(M, K, N): the layers of a ResNet-18 at 224x224 with a batch of four, and dense layers for three batches."""


class Conv(NamedTuple):
    """A 3x3 convolution, padded by 1."""

    network: str
    side: int
    channels: int
    features: int
    stride: int


CONVS = (
    Conv("ResNet-18", 56, 64, 64, 1),
    Conv("ResNet-18", 56, 64, 128, 2),
    Conv("ResNet-18", 28, 128, 128, 1),
    Conv("ResNet-18", 14, 256, 256, 1),
    Conv("ResNet-18", 7, 512, 512, 1),
    Conv("VGG-small", 32, 128, 128, 1),
    Conv("VGG-small", 16, 256, 256, 1),
    Conv("VGG-small", 8, 512, 512, 1),
)
BATCHES = (1, 64)


class Network(NamedTuple):
    """A network of the catalogue at its published size."""

    name: str
    side: int
    num_classes: int
    batches: tuple[int, ...]


NETWORKS = (
    Network("xnor_resnet18", 224, 1000, (1,)),
    Network("bireal18", 224, 1000, (1,)),
    Network("vgg_small", 32, 10, BATCHES),
)
ROUNDS, PAUSE_SECONDS = 3, 0.3
LEAST_SECONDS, MOST_CALLS = 0.05, 500
SIGNS = (-1, 1)


def benchmark_packed(
    *,
    matmuls: tuple[tuple[int, int, int], ...] = MATMULS,
    convs: tuple[Conv, ...] = CONVS,
    conv_batches: tuple[int, ...] = BATCHES,
    networks: tuple[Network, ...] = NETWORKS,
    repeats: int = 20,
    on_progress: OnProgress = silent,
) -> dict[str, Any]:
    """Medians of calls in a few rounds, compilation left out, everything with the same number of threads.

    All that XLA compiles, peers too, is compiled with `WIDE_VECTORS` of `bnn_jax.bitops.matmul`.

    Matmuls and convolutions: `packed` takes packed inputs, `packed_from_float` packs float32 activations first; peers
    are XLA's float32 and int8 products, and, where they are installed, PyTorch's float32 and bnn-lab's C kernel on
    packed inputs.  Networks: the frozen network beside the trained one (`trained`, the same function in float32, its
    weights quantized in every call) and the same architecture in full precision (`float32`).

    Returns:
      ``{"threads", "matmul": [row], "conv": [row], "network": [row], "summary"}``; a row has the shape, ``"ms"``:
      {who: median}, for products ``"gmacs"``: {who: 10^9 multiply-accumulates a second}, for networks the images a
      second, the peak memory in bytes and the size of the packed file.
    """
    total = len(matmuls) + len(convs) * len(conv_batches) + sum(len(n.batches) for n in networks)
    found: dict[str, Any] = {"threads": os.cpu_count(), "compiler_options": WIDE_VECTORS}
    found |= {"peers": installed_versions(("torch", "bnn-lab")), "matmul": [], "conv": [], "network": []}
    done = 0

    def add(kind: str, rows: list[dict[str, Any]], what: str) -> None:
        nonlocal done
        found[kind] += rows
        done += len(rows)
        on_progress(done, total, what)

    for shape in matmuls:
        add("matmul", [_matmul(shape, repeats)], "x".join(map(str, shape)))
    for conv in convs:
        for batch in conv_batches:
            add("conv", [_conv(conv, batch, repeats)], f"conv {conv.side}x{conv.side}x{conv.channels}")
    for network in networks:
        add("network", _network(network, repeats), network.name)
    return found | {"summary": summarize(found)}


def summarize(found: dict[str, Any]) -> dict[str, Any]:
    """Geometric means and the worst of the ratios by which `packed` is faster than each peer."""
    summary = {}
    for kind in ("matmul", "conv", "network"):
        peers = dict.fromkeys(who for row in found[kind] for who in row["ms"] if not who.startswith("packed"))
        ours = "packed_from_float" if kind == "conv" else "packed"
        for peer in peers:
            ratios = [row["ms"][peer] / row["ms"][ours] for row in found[kind] if peer in row["ms"]]
            summary[f"{kind}: {ours} over {peer}"] = {
                "geometric_mean": math.exp(np.mean(np.log(ratios))),
                "worst": min(ratios),
                "best": max(ratios),
            }
    return summary


def _medians(functions: dict[str, Callable[[], Any]], repeats: int) -> dict[str, float]:
    """Milliseconds, of at least `repeats` calls in a few rounds.

    In a round each function is called in a row, after a pause and a call that is not counted, and for some time at
    least: the threads of OpenMP, which PyTorch and bnn-lab use, go on spinning for a while after a call, and those of
    XLA sleep.
    """
    calls, seconds = {}, {name: [] for name in functions}
    for name, function in functions.items():
        first = interleaved_seconds({name: function}, repeats=1)[name][0]
        calls[name] = max(-(-repeats // ROUNDS), min(MOST_CALLS, int(LEAST_SECONDS / first)))
    for name in [name for _ in range(ROUNDS) for name in functions]:
        time.sleep(PAUSE_SECONDS)
        seconds[name] += interleaved_seconds({name: functions[name]}, repeats=calls[name])[name]
    return {name: median_ms(times) for name, times in seconds.items()}


def _products(
    x: np.ndarray, base: PackedBase, packed: Callable[..., Any], real: Callable[..., Any], kernel: np.ndarray
) -> dict[str, Callable[[], Any]]:
    """The four products of activations and a kernel in XLA."""
    activations, words = jnp.asarray(x), jax.block_until_ready(jax.jit(lambda x: pack(x >= 0))(jnp.asarray(x)))
    jit = partial(jax.jit, compiler_options=WIDE_VECTORS)
    # Arrays alone as arguments: a dataclass among them costs some tens of microseconds in every call.
    of_words = lambda x, words: packed(x, PackedBase(words, None, SIGNS))
    run, from_float = jit(of_words), jit(lambda x, words: of_words(pack(x >= 0), words))
    codes, signs = jnp.sign(activations).astype(jnp.int8), jnp.asarray(kernel, jnp.int8)
    weights = jnp.asarray(kernel)
    float32, int8 = jit(real), jit(partial(real, preferred_element_type=jnp.int32))
    return {
        "packed": lambda: run(words, base.words),
        "packed_from_float": lambda: from_float(activations, base.words),
        "float32": lambda: float32(activations, weights),
        "int8": lambda: int8(codes, signs),
    }


def _matmul(shape: tuple[int, int, int], repeats: int) -> dict[str, Any]:
    m, k, n = shape
    rng = np.random.default_rng(0)
    x, kernel = rng.standard_normal((m, k), np.float32), rng.choice(np.float32([-1, 1]), (k, n))
    base = PackedBase(pack_codes(jnp.asarray(kernel), SIGNS), None, SIGNS)
    packed = partial(dense_product, values=SIGNS, shape=(k, n))
    real = lambda x, w, **options: lax.dot_general(x, w, (((1,), (0,)), ((), ())), **options)
    functions = _products(x, base, packed, real, kernel)
    functions |= _torch_peer(lambda torch: partial(torch.matmul, torch.from_numpy(x), torch.from_numpy(kernel)))
    bnn_lab = _installed("bnn.kernels.packed")
    if bnn_lab is not None and k % 64 == 0:
        bnn_lab.set_num_threads(os.cpu_count())
        rows, columns = (_words64(x > 0), _words64(kernel.T > 0))
        functions["bnn_lab"] = lambda: bnn_lab.binary_gemm_native_prepacked(rows, columns, k)
    return _row({"shape": [m, k, n]}, _medians(functions, repeats), m * k * n)


def _words64(bits: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(np.packbits(bits, axis=1, bitorder="little")).view(np.uint64)


def _conv(conv: Conv, batch: int, repeats: int) -> dict[str, Any]:
    rng = np.random.default_rng(0)
    shape = (3, 3, conv.channels, conv.features)
    x = rng.standard_normal((batch, conv.side, conv.side, conv.channels), np.float32)
    kernel = rng.choice(np.float32([-1, 1]), shape)
    strides, padding = (conv.stride, conv.stride), ((1, 1), (1, 1))
    base = PackedBase(pack_codes(jnp.asarray(kernel), SIGNS), None, SIGNS)
    geometry = Geometry(strides, padding, (1, 1))
    packed = partial(conv_product, values=SIGNS, shape=shape, geometry=geometry, pad_value=0)
    dimensions = ("NHWC", "HWIO", "NHWC")
    real = lambda x, w, **o: lax.conv_general_dilated(x, w, strides, padding, dimension_numbers=dimensions, **o)
    functions = _products(x, base, packed, real, kernel)
    # XLA's integer convolution on CPU takes seconds.
    del functions["int8"]

    def torch_conv(torch):
        inputs = torch.from_numpy(x).permute(0, 3, 1, 2)  # a view of channels-last memory
        weights = torch.from_numpy(kernel).permute(3, 2, 0, 1).contiguous(memory_format=torch.channels_last)
        return partial(torch.nn.functional.conv2d, inputs, weights, stride=strides, padding=1)

    functions |= _torch_peer(torch_conv)
    out = -(-conv.side // conv.stride)
    return _row({**conv._asdict(), "batch": batch}, _medians(functions, repeats), batch * out**2 * math.prod(shape))


def _row(shape: dict[str, Any], ms: dict[str, float], macs: int) -> dict[str, Any]:
    return {**shape, "ms": ms, "gmacs": {who: macs / 1e6 / value for who, value in ms.items()}}


def _network(network: Network, repeats: int) -> list[dict[str, Any]]:
    binary = build_model(network.name, num_classes=network.num_classes)
    real = build_model(
        network.name,
        num_classes=network.num_classes,
        input_quantizer="full_precision",
        kernel_quantizer="full_precision",
    )
    image_shape = (network.side, network.side, 3)

    def initial(model):
        zeros = jnp.zeros((1, *image_shape))
        return jax.jit(lambda x: model.init(jax.random.key(0), x, train=False))(zeros)

    trained = dict(initial(binary))
    packed = freeze(binary, trained, image_shape)
    cases = {"packed": (binary, packed), "trained": (binary, trained), "float32": (real, initial(real))}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "network.bnn.safetensors"
        described = {"model": {"name": network.name}, "image_shape": image_shape, "mean": (0,) * 3, "std": (1,) * 3}
        save(path, PackedModel(binary, packed, described))
        file_bytes = path.stat().st_size
    rows = []
    for batch in network.batches:
        images = jnp.asarray(np.random.default_rng(0).standard_normal((batch, *image_shape), np.float32))
        functions, memory = {}, {}
        for who, (model, variables) in cases.items():
            apply = lambda variables, images, model=model: logits_of(model.apply(variables, images, train=False))
            program = jax.jit(apply, compiler_options=WIDE_VECTORS).lower(variables, images).compile()
            needs = program.memory_analysis()
            memory[who] = needs.argument_size_in_bytes + needs.temp_size_in_bytes + needs.output_size_in_bytes
            functions[who] = partial(program, variables, images)
        ms = _medians(functions, repeats)
        rows.append(
            {
                **network._asdict(),
                "batch": batch,
                "ms": ms,
                "images_per_second": {who: 1e3 * batch / value for who, value in ms.items()},
                "peak_memory": memory,
                "file_bytes": file_bytes,
            }
        )
    return rows


def _installed(module: str) -> ModuleType | None:
    """A module of an optional peer, or None."""
    try:
        return __import__(module, fromlist=["_"])
    except ImportError:
        return None


def _torch_peer(make: Callable[[ModuleType], Callable[[], Any]]) -> dict[str, Callable[[], Any]]:
    torch = _installed("torch")
    if torch is None:
        return {}
    torch.set_num_threads(os.cpu_count())
    function = make(torch)

    def run():
        with torch.inference_mode():
            return np.asarray(function())

    return {"torch": run}


NAMES = {
    "packed": "packed bits",
    "packed_from_float": "packed bits, packing included",
    "bnn_lab": "bnn-lab (C)",
    "float32": "XLA float32",
    "torch": "PyTorch float32",
    "int8": "XLA int8",
    "trained": "trained network, float32",
}


def print_packed(found: dict[str, Any], tables: Tables = TEXT) -> None:
    """Print the tables of :func:`benchmark_packed`, memory, file sizes and the mean ratios."""
    shapes = {
        "matmul": lambda row: "x".join(map(str, row["shape"])),
        "conv": lambda row: f"{row['side']}^2 {row['channels']}->{row['features']}, batch {row['batch']}",
        "network": lambda row: f"{row['name']} {row['side']}^2, batch {row['batch']}",
    }
    for kind, shape_of in shapes.items():
        measure = "ms" if kind == "network" else "gmacs"
        who = [name for name in NAMES if any(name in row[measure] for row in found[kind])]
        rows = [
            (shape_of(row), *(f"{row[measure][name]:.3g}" if name in row[measure] else "" for name in who))
            for row in found[kind]
        ]
        unit = "ms a batch" if kind == "network" else "10^9 multiply-accumulates a second"
        tables.print(("shape", *(NAMES[name].replace(" ", "\n", 1) for name in who)), rows, title=f"{kind}: {unit}")
    for row in found["network"]:
        memory = ", ".join(f"{NAMES[who]} {size / 1e6:.1f}" for who, size in row["peak_memory"].items())
        print(f"{row['name']} batch {row['batch']}: file {row['file_bytes'] / 1e6:.3f} MB; peak memory in MB: {memory}")
    for name, ratios in found["summary"].items():
        print(f"{name}: geometric mean {ratios['geometric_mean']:.2f}, {ratios['worst']:.2f} to {ratios['best']:.2f}")


def plot_packed(found: dict[str, Any], path: str | Path) -> Path:
    """Draw matmuls and convolutions as multiply-accumulates a second, networks as latency, to a PNG at `path`."""
    path = local_path("path", path)
    products = "10$^9$ multiply-accumulates / s"
    with drawing(path, (9.0, 12.0), count=3, columns=1) as (_, axes):
        labels = ["x".join(map(str, row["shape"])) for row in found["matmul"]]
        _bars(axes[0], labels, [row["gmacs"] for row in found["matmul"]], products, "Matrix products (M x K x N)")
        labels = [f"{r['side']}²·{r['channels']}→{r['features']}, batch {r['batch']}" for r in found["conv"]]
        _bars(axes[1], labels, [row["gmacs"] for row in found["conv"]], products, "Convolutions 3x3")
        labels = [f"{row['name']}, {row['side']}²\nbatch {row['batch']}" for row in found["network"]]
        _bars(axes[2], labels, [row["ms"] for row in found["network"]], "ms a batch (less is better)", "Networks")
    return path


def _bars(axes: "Axes", labels: list[str], rows: list[dict[str, float]], unit: str, title: str) -> None:
    who = [name for name in NAMES if any(name in row for row in rows)]
    colours = dict(zip(NAMES, COLOURS))
    width = 0.85 / max(1, len(who))
    for place, name in enumerate(who):
        positions = [i + (place - (len(who) - 1) / 2) * width for i, row in enumerate(rows) if name in row]
        axes.bar(positions, [row[name] for row in rows if name in row], width, label=NAMES[name], color=colours[name])
    many = {"rotation": 40, "ha": "right", "rotation_mode": "anchor"} if len(labels) > 8 else {}
    axes.grid(False, axis="x")
    axes.set_xticks(range(len(labels)), labels, fontsize=8, **many)
    axes.set_yscale("log")
    # Room for the legend.
    axes.set_ylim(top=6 * axes.get_ylim()[1])
    axes.set_ylabel(unit)
    axes.set_title(title)
    axes.legend(frameon=False, fontsize=8, ncols=3)
