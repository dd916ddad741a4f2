"""The gallery: every estimator and quantizer, drawn from the live functions, with its formula and its paper."""

import inspect
import json
import re
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
from pages import write
from sphinx.application import Sphinx

import bnn_jax
from bnn_jax.cli.tables import documented, function_behind, wrapped_by
from bnn_jax.compilation import QUICK_COMPILATION
from bnn_jax.estimators import ESTIMATORS
from bnn_jax.models import MODELS
from bnn_jax.quantizers import ACTIVATION_QUANTIZERS, WEIGHT_QUANTIZERS, bases, dequantize, make_quantizer

POINTS = np.linspace(-2.5, 2.5, 400, dtype=np.float32)
PROGRESS = {0.0: "#9ecae1", 0.5: "#4292c6", 1.0: "#08306b"}
"""Shares of the training done -> colour, for what changes during training."""
DRAWS = 64
"""What is random is drawn as the mean over so many keys."""

INTRODUCTIONS = {
    "estimators": """# Estimators

What stands in the place of the derivative of a step. Each takes numbers and returns their codes; its derivative is
chosen, not derived. Any of them serves as `input_quantizer` or, by `estimator=`, inside a quantizer of weights. Of a
random one the mean over 64 draws is drawn.

Left: the codes. Right: the derivative that the backward pass takes, and the area under it (a step of two has the true
area 2). A curve for each third of training where it changes.
""",
    "activations": """# Quantizers of activations

What a layer makes of its inputs, by name for `input_quantizer`. Left: the value that the layer multiplies, codes times
scale. Right: how the gradient of that value depends on the input of the same place.
""",
    "weights": """# Quantizers of weights

What a layer makes of its latent weights, by name for `kernel_quantizer`. Drawn is one filter of 400 weights, evenly
spaced from -2.5 to 2.5. Left: the weight that is multiplied, codes times scale. Right: the derivative of each by its
own latent weight, the part through the scale included.
""",
}


class Method(NamedTuple):
    """One entry of the gallery.

    Attributes:
      kind: the page it stands on.
      made: what the table holds.
      curve: (x, progress, key) -> the values.
      shape: of the x that it is drawn for.
      changes: whether the curve depends on the progress.
      random: whether it depends on the key.
      used: whether a network of the table has it.
    """

    name: str
    kind: str
    made: Callable[..., Any]
    curve: Callable[[Any, float, Any], Any]
    shape: tuple[int, ...]
    changes: bool
    random: bool
    used: Callable[[Any], bool]


def quantized(quantizer: Any, x: Any, progress: float, key: Any) -> Any:
    """The value that a layer multiplies, in training, with the quantizer's parameters at their start."""
    given = dict(quantizer.init(jax.random.key(0), x)) if quantizer.init else {}
    wanted = {"train": True, "progress": progress, "key": key}
    given |= {name: value for name, value in wanted.items() if name in quantizer.wants}
    if quantizer.init_state is None:
        return dequantize(bases(quantizer.apply(x, **given)))
    state = quantizer.init_state(jax.random.key(0), x)
    return dequantize(bases(quantizer.apply(x, state, **given)[0]))


def methods() -> Iterator[Method]:
    """All that the gallery shows."""
    for name, record in ESTIMATORS.items():

        def curve(x, progress, key, record=record):
            given = record.schedule(progress) if record.schedule else {}
            return record.apply(x, **given, **({"key": key} if record.stochastic else {}))

        def used(entry, name=name):
            options = (entry.input_quantizer_options, entry.kernel_quantizer_options)
            return entry.input_quantizer == name or any(o.get("estimator") == name for o in options)

        changes = record.schedule is not None
        yield Method(name, "estimators", record.apply, curve, POINTS.shape, changes, record.stochastic, used)
    tables = {"activations": ACTIVATION_QUANTIZERS, "weights": WEIGHT_QUANTIZERS}
    for kind, table in tables.items():
        place, shape = ("input_quantizer", (1, -1, 1)) if kind == "activations" else ("kernel_quantizer", (-1, 1))
        for name, made in table.items():
            quantizer = None if name in ESTIMATORS else make_quantizer(table, name)
            if quantizer is not None:
                used = partial(lambda entry, place, name: getattr(entry, place) == name, place=place, name=name)
                changes, random = ("progress" in quantizer.wants), ("key" in quantizer.wants)
                yield Method(name, kind, made, partial(quantized, quantizer), shape, changes, random, used)


def values_and_slopes(method: Method, progress: float) -> tuple[np.ndarray, np.ndarray]:
    """The values at POINTS, and the derivative of each by its own point; of what is random their means."""

    def of_key(key):
        values, pull = jax.vjp(
            lambda x: method.curve(x.reshape(method.shape), progress, key).ravel(), jnp.asarray(POINTS)
        )
        (rows,) = jax.vmap(pull)(jnp.eye(len(POINTS)))
        return values, jnp.diagonal(rows)

    keys = jax.random.split(jax.random.key(0), DRAWS)[: DRAWS if method.random else 1]
    drawn = map(jax.jit(of_key, compiler_options=QUICK_COMPILATION), keys)
    values, slopes = (np.mean(parts, axis=0) for parts in zip(*drawn))
    return values, slopes


def draw(method: Method, path: Path) -> float | None:
    """Draw a method; returns the area under the derivative of an estimator."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.2, 1.8), layout="constrained")
    left, right = figure.subplots(1, 2)
    for progress, colour in PROGRESS.items() if method.changes else [(1.0, "#08306b")]:
        values, slopes = values_and_slopes(method, progress)
        label = f"{progress:.0%} done" if method.changes else None
        left.plot(POINTS, values, color=colour, linewidth=1.5, label=label)
        right.plot(POINTS, slopes, color=colour, linewidth=1.5)
    of_draws = ", mean" if method.random else ""
    left.set_title(f"value{of_draws}", fontsize=9)
    right.set_title(f"derivative{of_draws}", fontsize=9)
    for axes in (left, right):
        axes.tick_params(labelsize=8)
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    right.set_ylim(bottom=min(0, right.get_ylim()[0]))
    if method.changes:
        left.legend(fontsize=7, frameon=False, loc="upper left", handlelength=1.2)
    path.parent.mkdir(parents=True, exist_ok=True)
    with matplotlib.rc_context({"svg.hashsalt": "gallery"}):
        figure.savefig(path, metadata={"Date": None})
    return area_of(method) if method.kind == "estimators" else None


def area_of(method: Method) -> float:
    """The area under an estimator's derivative from -2.5 to 2.5, at the end of training."""
    x = np.linspace(-2.5, 2.5, 20001, dtype=np.float32)
    gradient = jax.grad(lambda x: method.curve(x, 1.0, jax.random.key(0)).sum())
    slopes = jax.jit(gradient, compiler_options=QUICK_COMPILATION)(jnp.asarray(x))
    return float(np.trapezoid(np.asarray(slopes), x))


def pictures(folder: Path, wanted: list[Method]) -> list[float | None]:
    """Draw the pictures that are not there or older than the code; returns the areas of all."""
    record = folder / "areas.json"
    areas = json.loads(record.read_text()) if record.exists() else {}
    code = [Path(__file__), *Path(bnn_jax.__file__).parent.rglob("*.py")]
    newest = max(file.stat().st_mtime for file in code)
    for method in wanted:
        path = folder / f"{method.kind}_{method.name}.svg"
        if path.name not in areas or not path.exists() or path.stat().st_mtime < newest:
            areas[path.name] = draw(method, path)
    folder.mkdir(parents=True, exist_ok=True)
    record.write_text(json.dumps(areas))
    return [areas[f"{method.kind}_{method.name}.svg"] for method in wanted]


def formula_of(made: Callable[..., Any]) -> str:
    """The paragraph of a docstring that begins with Forward."""
    made = function_behind(made)
    paragraphs = (inspect.getdoc(wrapped_by(made) or made) or "").split("\n\n")
    return "\n\n".join(text for text in paragraphs if re.match(r"(Forward|Backward)\b", text))


def options_of(made: Callable[..., Any]) -> str:
    """What the function of a method takes by keyword, with its defaults."""
    known = inspect.signature(function_behind(made)).parameters.values()
    taken = [p for p in known if p.kind is p.KEYWORD_ONLY and p.name not in ("key", "train", "progress")]
    defaults = {p.name: getattr(p.default, "__name__", p.default) for p in taken if p.default is not p.empty}
    return ", ".join(f"`{p.name}`" + (f" {defaults[p.name]}" if p.name in defaults else "") for p in taken)


def section(method: Method, area: float | None) -> str:
    """The section of a method."""
    line, paper = documented(method.made)
    networks = [name for name, entry in MODELS.items() if method.used(entry)]
    shown = ", ".join(f"`{name}`" for name in networks[:6]) + (f" and {len(networks) - 6} more" if networks[6:] else "")
    facts = {
        "Paper": paper.replace("*", r"\*"),
        "Options": options_of(method.made),
        "Area": "" if area is None else f"{area:.3g}",
        "Networks": shown,
    }
    told = "\n".join(f"- {name}: {text}" for name, text in facts.items() if text)
    formula = formula_of(method.made)
    block = f"```text\n{formula}\n```\n" if formula else ""
    picture = f"![Value and derivative of {method.name}](pictures/{method.kind}_{method.name}.svg)"
    return f"## {method.name}\n\n{line}\n\n{picture}\n\n{block}\n{told}\n"


def card(method: Method) -> str:
    """The card of a method on the page where all stand side by side."""
    return (
        f":::{{grid-item-card}} {method.name}\n:link: {method.kind}.html#{method.name.replace('_', '-')}\n"
        f":link-type: url\n:link-alt: {method.name}\n:class-card: method\n"
        f":img-bottom: pictures/{method.kind}_{method.name}.svg\n:img-alt: Value and derivative of {method.name}\n:::\n"
    )


def generate(app: Sphinx) -> None:
    """Draw all methods and write the pages."""
    folder = Path(app.srcdir) / "gallery"
    pages = {kind: [text] for kind, text in INTRODUCTIONS.items()}
    cards: dict[str, list[str]] = {kind: [] for kind in INTRODUCTIONS}
    wanted = list(methods())
    for method, area in zip(wanted, pictures(folder / "pictures", wanted)):
        pages[method.kind].append(section(method, area))
        cards[method.kind].append(card(method))
    for kind, sections in pages.items():
        write(folder / f"{kind}.md", "\n".join(sections))
    count = sum(map(len, cards.values()))
    index = [f"# Gallery of estimators and quantizers\n\nAll {count} methods of the tables side by side.\n"]
    for kind, made in cards.items():
        title = INTRODUCTIONS[kind].partition("\n")[0].removeprefix("# ")
        index.append(f"## {title}\n\n::::{{grid}} 1 1 2 2\n:gutter: 2\n\n{''.join(made)}::::\n")
    index.append("```{toctree}\n:hidden:\n\n" + "\n".join(INTRODUCTIONS) + "\n```\n")
    write(folder / "index.md", "\n".join(index))


def setup(app: Sphinx) -> dict[str, Any]:
    app.connect("builder-inited", generate)
    return {"parallel_read_safe": True}
