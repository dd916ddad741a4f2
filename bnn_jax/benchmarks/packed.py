"""How fast packed bits are: products, convolutions and whole networks, each beside its peers in the same process."""

import math
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from bnn_jax.analysis.provenance import installed_versions
from bnn_jax.bitops.bits import pack
from bnn_jax.bitops.conv import Geometry
from bnn_jax.bitops.paths import PATHS, chosen_path
from bnn_jax.bitops.planes import PackedBase, conv_product, dense_product, pack_codes, unpack_codes
from bnn_jax.compilation import packed_options
from bnn_jax.cores import usable_cores
from bnn_jax.layers import conv as layer_conv
from bnn_jax.models.build import build_model
from bnn_jax.outputs import logits_of
from bnn_jax.packed import PackedModel, freeze, paths_of, save, take_path
from bnn_jax.timing import interleaved_seconds, median_ms
from bnn_jax.training.progress import OnProgress, silent

MATMULS = (
    (12544, 576, 64),
    (3136, 1152, 128),
    (784, 2304, 256),
    (196, 4608, 512),
    (1024, 4096, 4096),
    (64, 4096, 4096),
    (1, 4096, 4096),
    (197, 384, 384),
    (197, 384, 1536),
)
"""(M, K, N): layers of a ResNet-18 at 224x224 with a batch of four, dense layers for three batches, and those of a
small vision transformer's 197 tokens."""


class Conv(NamedTuple):
    """A 3x3 convolution, padded by 1."""

    network: str
    side: int
    channels: int
    features: int
    stride: int
    groups: int = 1


CONVS = (
    Conv("ResNet-18", 56, 64, 64, 1),
    Conv("ResNet-18", 56, 64, 128, 2),
    Conv("ResNet-18", 28, 128, 128, 1),
    Conv("ResNet-18", 14, 256, 256, 1),
    Conv("ResNet-18", 7, 512, 512, 1),
    Conv("VGG-small", 32, 128, 128, 1),
    Conv("VGG-small", 16, 256, 256, 1),
    Conv("VGG-small", 8, 512, 512, 1),
    Conv("ResNet-20", 32, 16, 16, 1),
    Conv("ResNet-20", 16, 32, 32, 1),
    Conv("ResNet-20", 8, 64, 64, 1),
    Conv("grouped", 28, 128, 128, 1, groups=4),
    Conv("depthwise", 56, 64, 64, 1, groups=64),
    Conv("depthwise", 14, 256, 256, 1, groups=256),
)
BATCHES, SMALL_BATCHES = (1, 64), (1, 128)


class Network(NamedTuple):
    """A network of the catalogue, at its published size if `settings` say no other."""

    name: str
    side: int
    num_classes: int
    batches: tuple[int, ...]
    channels: int = 3
    settings: Mapping[str, Any] = {}


NETWORKS = (
    Network("xnor_resnet18", 224, 1000, (1,)),
    Network("bireal18", 224, 1000, (1,)),
    Network("vgg_small", 32, 10, BATCHES),
    Network("resnet20", 32, 10, SMALL_BATCHES),
    Network("lenet", 28, 10, SMALL_BATCHES, 1, {"input_quantizer": "ste_sign", "kernel_quantizer": "xnor"}),
    Network("resnet6", 8, 10, SMALL_BATCHES, 1, {"width": 32}),
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
    minutes: float = math.inf,
    on_progress: OnProgress = silent,
) -> dict[str, Any]:
    """Medians of calls in a few rounds, compilation left out, everything with the same number of threads.

    All that XLA compiles, peers too, is compiled with `packed_options` of `bnn_jax.compilation`.

    Matmuls and convolutions: `packed` takes packed inputs, `packed_from_float` packs float32 activations first,
    `numbers_from_float` multiplies their codes by the unpacked kernel; `chosen` is the time of the one of these two
    that a frozen layer takes, its `path`.  Peers are XLA's float32 and int8 products, and, where they are installed,
    PyTorch's float32 and bnn-lab's C kernel on packed inputs.  Networks: the frozen network beside the trained one
    (`trained`, the same function in float32, its weights quantized in every call), the same architecture in full
    precision (`float32`), and the frozen one with all layers on one path, where they are not (`on_bits`, `on_float32`).

    Args:
      matmuls, convs, conv_batches, networks: what is measured, networks first.
      repeats: calls of each, at least.
      minutes: nothing is begun after so many.

    Returns:
      ``{"threads", "matmul": [row], "conv": [row], "network": [row], "not_measured": [what], "summary"}``; a row has
      the shape, its ``"path"`` (of a network, how many layers take which), ``"ms"``: {who: median}, for products
      ``"gmacs"``: {who: 10^9 multiply-accumulates a second}, for networks the images a second, the peak memory in bytes
      and the size of the packed file.
    """
    found: dict[str, Any] = {"threads": len(usable_cores()), "compiler_options": packed_options()}
    found |= {"peers": installed_versions(("torch", "bnn-lab")), "matmul": [], "conv": [], "network": []}
    tasks = [("network", network.name, partial(_network, network, repeats)) for network in networks]
    tasks += [
        ("conv", f"conv {conv.side}x{conv.side}x{conv.channels}, batch {batch}", partial(_conv, conv, batch, repeats))
        for conv in convs
        for batch in conv_batches
    ]
    tasks += [("matmul", "x".join(map(str, shape)), partial(_matmul, shape, repeats)) for shape in matmuls]
    began, done = time.monotonic(), 0
    for kind, what, measure in tasks:
        if time.monotonic() - began > 60 * minutes:
            break
        found[kind] += measure()
        done += 1
        on_progress(done, len(tasks), what)
    return found | {"not_measured": [what for _, what, _ in tasks[done:]], "summary": summarize(found)}


def summarize(found: dict[str, Any]) -> dict[str, Any]:
    """Geometric means and the worst of the ratios by which what a frozen network takes is faster than each peer.

    The other path is a peer too: the worst ratio of that should not be below 0.9.
    """
    summary = {}
    for kind, ours in {"matmul": "packed", "conv": "chosen", "network": "packed"}.items():
        peers = dict.fromkeys(who for row in found[kind] for who in row["ms"] if who not in (ours, "packed"))
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
    XLA sleep.  On accelerators, where no such peers are, there is no pause.
    """
    pause = PAUSE_SECONDS if jax.default_backend() == "cpu" else 0.0
    calls, seconds = {}, {name: [] for name in functions}
    for name, function in functions.items():
        first = interleaved_seconds({name: function}, repeats=1)[name][0]
        calls[name] = max(-(-repeats // ROUNDS), min(MOST_CALLS, int(LEAST_SECONDS / first)))
    for name in [name for _ in range(ROUNDS) for name in functions]:
        time.sleep(pause)
        seconds[name] += interleaved_seconds({name: functions[name]}, repeats=calls[name])[name]
    return {name: median_ms(times) for name, times in seconds.items()}


def _products(
    x: np.ndarray,
    base: PackedBase,
    packed: Callable[..., Any],
    real: Callable[..., Any],
    kernel: np.ndarray,
    *,
    of_layer: Callable[..., Any],
) -> dict[str, Callable[[], Any]]:
    """The five products of activations and a kernel in XLA; `of_layer` is that of numbers in a layer."""
    activations, words = jnp.asarray(x), jax.block_until_ready(jax.jit(lambda x: pack(x >= 0))(jnp.asarray(x)))
    jit = partial(jax.jit, compiler_options=packed_options())
    # Arrays alone as arguments: a dataclass among them costs some tens of microseconds in every call.
    of_words = lambda x, words: packed(x, PackedBase(words, None, SIGNS))
    run, from_float = jit(of_words), jit(lambda x, words: of_words(pack(x >= 0), words))
    codes, signs = jnp.sign(activations).astype(jnp.int8), jnp.asarray(kernel, jnp.int8)
    weights = jnp.asarray(kernel)
    float32, int8 = jit(real), jit(partial(real, preferred_element_type=jnp.int32))
    unpacked = lambda words: unpack_codes(PackedBase(words, None, SIGNS), kernel.shape)
    numbers = jit(lambda x, words: of_layer(jnp.where(x >= 0, 1.0, -1.0), unpacked(words)).astype(jnp.int32))
    return {
        "packed": lambda: run(words, base.words),
        "packed_from_float": lambda: from_float(activations, base.words),
        "numbers_from_float": lambda: numbers(activations, base.words),
        "float32": lambda: float32(activations, weights),
        "int8": lambda: int8(codes, signs),
    }


def _matmul(shape: tuple[int, int, int], repeats: int) -> list[dict[str, Any]]:
    m, k, n = shape
    rng = np.random.default_rng(0)
    x, kernel = rng.standard_normal((m, k), np.float32), rng.choice(np.float32([-1, 1]), (k, n))
    base = PackedBase(pack_codes(jnp.asarray(kernel), SIGNS), None, SIGNS)
    packed = partial(dense_product, values=SIGNS, shape=(k, n))
    real = lambda x, w, **options: lax.dot_general(x, w, (((1,), (0,)), ((), ())), **options)
    functions = _products(x, base, packed, real, kernel, of_layer=real)
    functions |= _torch_peer(lambda torch: partial(torch.matmul, torch.from_numpy(x), torch.from_numpy(kernel)))
    bnn_lab = _installed("bnn.kernels.packed")
    if bnn_lab is not None and k % 64 == 0:
        bnn_lab.set_num_threads(len(usable_cores()))
        rows, columns = (_words64(x > 0), _words64(kernel.T > 0))
        functions["bnn_lab"] = lambda: bnn_lab.binary_gemm_native_prepacked(rows, columns, k)
    path = chosen_path(channels=k, fan_in=k, features=n)
    return [_row({"shape": [m, k, n], "path": path}, _medians(functions, repeats), m * k * n)]


def _words64(bits: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(np.packbits(bits, axis=1, bitorder="little")).view(np.uint64)


def _conv(conv: Conv, batch: int, repeats: int) -> list[dict[str, Any]]:
    rng = np.random.default_rng(0)
    shape = (3, 3, conv.channels // conv.groups, conv.features)
    x = rng.standard_normal((batch, conv.side, conv.side, conv.channels), np.float32)
    kernel = rng.choice(np.float32([-1, 1]), shape)
    strides, padding = (conv.stride, conv.stride), ((1, 1), (1, 1))
    base = PackedBase(pack_codes(jnp.asarray(kernel), SIGNS), None, SIGNS)
    geometry = Geometry(strides, padding, (1, 1), conv.groups)
    packed = partial(conv_product, values=SIGNS, shape=shape, geometry=geometry, pad_value=0)
    layout = {"dimension_numbers": ("NHWC", "HWIO", "NHWC"), "feature_group_count": conv.groups}
    real = lambda x, w, **options: lax.conv_general_dilated(x, w, strides, padding, **layout, **options)
    of_layer = partial(layer_conv, strides=strides, padding=padding, groups=conv.groups)
    functions = _products(x, base, packed, real, kernel, of_layer=of_layer)
    # XLA's integer convolution on CPU takes seconds.
    del functions["int8"]

    def torch_conv(torch):
        inputs = torch.from_numpy(x).permute(0, 3, 1, 2)  # a view of channels-last memory
        weights = torch.from_numpy(kernel).permute(3, 2, 0, 1).contiguous(memory_format=torch.channels_last)
        window = {"stride": strides, "padding": 1, "groups": conv.groups}
        return partial(torch.nn.functional.conv2d, inputs, weights, **window)

    functions |= _torch_peer(torch_conv)
    out, fan_in = -(-conv.side // conv.stride), math.prod(shape[:3])
    path = chosen_path(channels=shape[2], fan_in=fan_in, features=shape[3], groups=conv.groups)
    ms = _medians(functions, repeats)
    ms["chosen"] = ms[{"bits": "packed_from_float", "float32": "numbers_from_float"}[path]]
    return [_row({**conv._asdict(), "batch": batch, "path": path}, ms, batch * out**2 * math.prod(shape))]


def _row(shape: dict[str, Any], ms: dict[str, float], macs: int) -> dict[str, Any]:
    return {**shape, "ms": ms, "gmacs": {who: macs / 1e6 / value for who, value in ms.items()}}


def _network(network: Network, repeats: int) -> list[dict[str, Any]]:
    build = partial(build_model, network.name, num_classes=network.num_classes)
    unquantized = dict.fromkeys(("input_quantizer", "kernel_quantizer"), "full_precision")
    binary, real = build(**network.settings), build(**network.settings | unquantized)
    image_shape = (network.side, network.side, network.channels)

    def initial(model):
        zeros = jnp.zeros((1, *image_shape))
        return jax.jit(lambda x: model.init(jax.random.key(0), x, train=False))(zeros)

    trained = dict(initial(binary))
    packed = freeze(binary, trained, image_shape)
    cases = {"packed": (binary, packed), "trained": (binary, trained), "float32": (real, initial(real))}
    taken = Counter(paths_of(binary, packed, image_shape).values())
    cases |= {f"on_{path}": (binary, take_path(packed, path)) for path in PATHS if taken.keys() != {path}}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "network.bnn.safetensors"
        described = {"model": {"name": network.name, **network.settings}, "image_shape": image_shape}
        described |= {"mean": (0,) * network.channels, "std": (1,) * network.channels}
        save(path, PackedModel(binary, packed, described))
        file_bytes = path.stat().st_size
    rows = []
    for batch in network.batches:
        images = jnp.asarray(np.random.default_rng(0).standard_normal((batch, *image_shape), np.float32))
        functions, memory = {}, {}
        for who, (model, variables) in cases.items():
            apply = lambda variables, images, model=model: logits_of(model.apply(variables, images, train=False))
            program = jax.jit(apply, compiler_options=packed_options()).lower(variables, images).compile()
            needs = program.memory_analysis()
            memory[who] = needs.argument_size_in_bytes + needs.temp_size_in_bytes + needs.output_size_in_bytes
            functions[who] = partial(program, variables, images)
        ms = _medians(functions, repeats)
        rows.append(
            {
                **network._asdict(),
                "batch": batch,
                "path": ", ".join(f"{path} {count}" for path, count in sorted(taken.items())),
                "ms": ms,
                "images_per_second": {who: 1e3 * batch / value for who, value in ms.items()},
                "peak_memory": memory,
                "file_bytes": file_bytes,
            }
        )
    return rows


def _installed(module: str) -> ModuleType | None:
    """A module of an optional peer, or None; both run on the CPU, beside which nothing else is compared."""
    if jax.default_backend() != "cpu":
        return None
    try:
        return __import__(module, fromlist=["_"])
    except ImportError:
        return None


def _torch_peer(make: Callable[[ModuleType], Callable[[], Any]]) -> dict[str, Callable[[], Any]]:
    torch = _installed("torch")
    if torch is None:
        return {}
    torch.set_num_threads(len(usable_cores()))
    function = make(torch)

    def run():
        with torch.inference_mode():
            return np.asarray(function())

    return {"torch": run}
