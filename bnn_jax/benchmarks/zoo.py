"""How long every network of the catalogue takes for one image: packed, and the same architecture in full precision."""

import math
import time
from collections import Counter
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bnn_jax.analysis.tables import TEXT, Tables
from bnn_jax.compilation import packed_options
from bnn_jax.cores import usable_cores
from bnn_jax.models import MODELS
from bnn_jax.models.build import build_model, settings_taken
from bnn_jax.models.extents import Extent, extent_of
from bnn_jax.outputs import init_network, network_logits
from bnn_jax.packed import packed_structure, paths_of
from bnn_jax.timing import interleaved_seconds, median_ms
from bnn_jax.training.progress import OnProgress, silent

UNQUANTIZED = dict.fromkeys(("input_quantizer", "kernel_quantizer"), "full_precision")
REAL_ATTENTION = {"binary_scores": False, "binary_values": False}
"""Of networks that have attention."""
LEAST_CALLS, MOST_SECONDS = 5, 2.0
"""Of the repeats of a network whose calls would take longer together than so many seconds there are fewer."""


def in_turn(names: Iterable[str]) -> list[str]:
    """The names so that the first of each file of blocks come first, then the second ones.

    >>> in_turn(["resnet6", "resnet20", "bireal18"])
    ['resnet6', 'bireal18', 'resnet20']
    """
    seen: Counter[str] = Counter()
    ranked = []
    for name in names:
        constructor = MODELS[name].constructor
        module = getattr(constructor, "func", constructor).__module__  # of a partial that of its function
        ranked.append((seen[module], name))
        seen[module] += 1
    return [name for _, name in sorted(ranked, key=lambda pair: pair[0])]


def benchmark_zoo(
    *,
    networks: Iterable[str] = MODELS,
    extents: Callable[[str], Extent] = extent_of,
    repeats: int = 20,
    minutes: float = 6.0,
    on_progress: OnProgress = silent,
) -> dict[str, Any]:
    """The median latency of a batch of one image, packed and in full precision, called in turn.

    Variables are made up: how long a network takes does not depend on their values.  Both programs are compiled with
    `packed_options` of `bnn_jax.compilation`, and take normalized float32 images.

    Args:
      networks: names in MODELS; one of each family is measured first.
      extents: name -> the image it takes, its classes, its options.
      repeats: calls of each; fewer where they would take long.
      minutes: no network is begun after so many.

    Returns:
      ``{"threads", "compiler_options", "not_measured": [name], "network": [row]}``; a row has `name`, `image_shape`,
      `num_classes`, `options`, ``"ms": {who: median}``, `calls` and ``"path"``, how many of its layers multiply on
      which.  A network without quantized weights, or one that cannot be packed, has `float32` alone, and the reason
      under `not_packed`.
    """
    names, began, rows = in_turn(networks), time.monotonic(), []
    for number, name in enumerate(names):
        if time.monotonic() - began > 60 * minutes:
            break
        rows.append(measured(name, extents(name), repeats))
        on_progress(number + 1, len(names), name)
    order = {name: position for position, name in enumerate(MODELS)}
    rows.sort(key=lambda row: order[row["name"]])
    found = {"threads": len(usable_cores()), "compiler_options": packed_options(), "repeats": repeats}
    return found | {"not_measured": names[len(rows) :], "network": rows}


def measured(name: str, extent: Extent, repeats: int) -> dict[str, Any]:
    """The row of a network."""
    binary, shape = build_model(name, num_classes=extent.num_classes, options=extent.options), extent.image_shape
    real = in_full_precision(name, extent)
    rng = np.random.default_rng(0)
    cases = {"float32": (real, made_up(initial_structure(real, shape), rng))}
    row = {"name": name, **extent._asdict(), "options": dict(extent.options), "path": ""}
    try:
        packed = made_up(packed_structure(binary, shape), rng)
    except ValueError as error:  # No quantized weights, or a quantizer without codes in evaluation.
        row["not_packed"] = str(error)
    else:
        cases = {"packed": (binary, packed), **cases}
        taken = Counter(paths_of(binary, packed, shape).values())
        row["path"] = ", ".join(f"{path} {count}" for path, count in sorted(taken.items()))
    images = jnp.asarray(rng.standard_normal((1, *shape), np.float32))
    if shape[1:] == (1, 1):
        images = jnp.abs(images).astype(jnp.int32).astype(jnp.float32)  # tokens

    def compiled(case: tuple[Any, Any]) -> Callable[[], Any]:
        model, variables = case
        program = jax.jit(partial(network_logits, model), compiler_options=packed_options())
        return partial(program.lower(variables, images).compile(), variables, images)

    with ThreadPoolExecutor() as threads:
        functions = dict(zip(cases, threads.map(compiled, cases.values())))
    first = interleaved_seconds(functions, repeats=1)
    calls = max(min(repeats, LEAST_CALLS), min(repeats, int(MOST_SECONDS / sum(s for (s,) in first.values()))))
    seconds = interleaved_seconds(functions, repeats=calls)
    return row | {"ms": {who: median_ms(times) for who, times in seconds.items()}, "calls": calls}


def in_full_precision(name: str, extent: Extent) -> Any:
    """The network of this architecture that has no product of codes."""
    options = {key: value for key, value in REAL_ATTENTION.items() if key in (settings_taken(name) or ())}
    return build_model(name, num_classes=extent.num_classes, options={**extent.options, **options}, **UNQUANTIZED)


def initial_structure(model: Any, image_shape: tuple[int, ...]) -> Any:
    """Shapes and dtypes of a network's variables."""
    images = jax.ShapeDtypeStruct((1, *image_shape), jnp.float32)
    return dict(jax.eval_shape(partial(init_network, model), jax.random.key(0), images)[1])


def made_up(structure: Any, rng: np.random.Generator) -> Any:
    """Variables of these shapes: random bits, kernels with the variance of 1 / fan-in, all else between 1/2 and 1."""

    def leaf(path: tuple[Any, ...], like: jax.ShapeDtypeStruct) -> jax.Array:
        name = jax.tree_util.keystr(path[-1:], simple=True)
        if like.dtype == jnp.uint32:
            values = rng.integers(0, 2**32, like.shape, np.uint32)
        elif like.dtype == jnp.int32:
            values = np.zeros(like.shape, np.int32)
        elif name.endswith("kernel"):
            values = rng.standard_normal(like.shape, np.float32) / math.sqrt(max(1, math.prod(like.shape[:-1])))
        else:
            values = rng.uniform(0.5, 1.0, like.shape)
        return jnp.asarray(values, like.dtype)

    return jax.tree_util.tree_map_with_path(leaf, structure)


def print_zoo(found: dict[str, Any], tables: Tables = TEXT) -> None:
    """Print the latencies and their ratio."""
    rows = []
    for row in found["network"]:
        ms = row["ms"]
        ratio = f"{ms['float32'] / ms['packed']:.2f}" if "packed" in ms else ""
        packed = f"{ms['packed']:.3g}" if "packed" in ms else ""
        size = "x".join(map(str, row["image_shape"]))
        rows.append((row["name"], size, row["path"], packed, f"{ms['float32']:.3g}", ratio, str(row["calls"])))
    header = ("network", "image", "path", "packed\nms", "float32\nms", "times\nas fast", "calls")
    tables.print(header, rows, texts=(0, 1, 2), title="one image: ms")
    if found["not_measured"]:
        print(f"out of time before: {', '.join(found['not_measured'])}")
