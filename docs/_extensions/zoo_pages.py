"""The zoo: all networks in one table, a section of each with a picture of its gradient paths, the pretrained files."""

import html
import json
import re
import struct
from collections.abc import Iterator, Mapping
from dataclasses import fields
from pathlib import Path
from statistics import mean
from typing import TYPE_CHECKING, Any, NamedTuple

from pages import write

from bnn_jax.analysis.gradient_paths import path_graph, smallest
from bnn_jax.analysis.path_diagram import draw_gradient_paths, short
from bnn_jax.cli.tables import documented, paper_of
from bnn_jax.models import MODELS
from bnn_jax.models.build import build_model, settings_taken
from bnn_jax.models.extents import Extent, extent_of
from bnn_jax.zoo import DATA, PRETRAINED, file_of

if TYPE_CHECKING:
    from sphinx.application import Sphinx

ROOT = Path(__file__).parents[2]
SIZES, LATENCIES = ROOT / "results" / "zoo_sizes.json", ROOT / "results" / "benchmark_zoo.json"
DASH = "–"
SETS = {(224, 224, 3): "ImageNet", (32, 32, 3): "CIFAR-10", (28, 28, 1): "MNIST", (8, 8, 1): "digits"}

ZHU = "Zhu, Hofstee, Lee, Al-Ars, Improving Gradient Paths for Binary Convolutional Neural Networks, Table 1"
LARQ = "larq zoo, the weights that it publishes"
PUBLISHED: dict[str, tuple[float, str]] = {
    "alexnet_xnor": (44.2, "Rastegari et al., XNOR-Net, 2016"),
    "bnn_resnet18": (42.2, ZHU),
    "xnor_resnet18": (51.2, ZHU),
    "xnor_pp_resnet18": (57.1, ZHU),
    "tbn_resnet18": (55.6, ZHU),
    "tbn_resnet34": (58.2, ZHU),
    "bireal18": (56.4, ZHU),
    "bireal34": (62.2, ZHU),
    "cinet_resnet18": (56.7, ZHU),
    "irnet_resnet18": (58.1, ZHU),
    "rbnn_resnet18": (59.9, ZHU),
    "ftbnn_resnet18": (60.2, ZHU),
    "dgrl_resnet18": (60.45, ZHU),
    "binaryduo_resnet18": (60.9, ZHU),
    "igp_resnet37": (62.87, ZHU),
    "real_to_binary_resnet18": (65.4, ZHU),
    "reactnet18": (65.9, ZHU),
    "igp_resnet41": (64.38, ZHU),
    "binary_densenet51": (60.7, ZHU),
    "igp_densenet51": (63.27, ZHU),
    "binary_densenet69": (62.5, ZHU),
    "igp_densenet69": (64.8, ZHU),
    "resnet18": (69.3, ZHU),
    "resnet34": (73.2, ZHU),
    "irnet_resnet20": (86.5, "Qin et al., IR-Net, 2020"),
    "vgg_small": (90.4, "Qin et al., IR-Net, 2020"),
    "irnet_resnet34": (62.9, "Qin et al., IR-Net, 2020"),
    "rbnn_resnet20": (86.5, "Lin et al., Rotated Binary Neural Network, 2020"),
    "resnet20": (75.87, "Paren et al., Binary Neural Networks, Oxford, poster: Deep Frank-Wolfe; 72.89 with Adam"),
    "quicknet_small": (59.4, LARQ),
    "quicknet": (63.3, LARQ),
    "quicknet_large": (66.9, LARQ),
}
"""name -> top-1 accuracy (%) on the set of its images, and where it is stated."""

SHORT = {"stage_sizes": (1, 1), "columns": (2, 2), "depths": (2, 2), "num_cells": 3, "depth": 1}
"""What makes a network short enough to draw."""

SCALE = 0.55
"""By which pictures are shown smaller than they are drawn."""

INTRODUCTION = """---
hide-toc: true
---
# Zoo

Every network of the literature that is here, as published, for one image of the set that it was published for. A click
on a heading sorts; [a section of each](networks.md) has the picture of its gradient paths and the line that builds it.
"""

LEGEND = """
- *published*: top-1 accuracy in percent, with its source; *here*: what a run of this repository reaches, mean over
  seeds at the best validation epoch, on the set named; the run's report has its settings.
- *M params*: the numbers that inference needs, in 10^6; *Mbit*: 10^6 bits, weights at their bits, all others at 32.
- *MMAC*: 10^6 multiply-accumulates, of *quantized* factors and of *real* ones; *file*: 10^3 bytes packed, without the
  header of up to 4 KiB.
- *packed*, *float32*: milliseconds for a batch of one image on a CPU, the packed network and the same architecture in
  full precision, called in turn in one process; {machine}
- *N_2nd*: the second smallest cost of a [gradient path](networks.md), in 10^6 multiply-accumulates of binary products.

`bnn-jax summarize --table zoo --json results/zoo_sizes.json` and `bnn-jax benchmark zoo --output
results/benchmark_zoo.json` remake the numbers.
"""

PRETRAINED_PAGE = """
## Pretrained networks

They come with the package, packed. The seed and the epoch were chosen by validation accuracy; the test accuracy is that
of the packed network, exact, and `pytest tests/zoo` counts it again.

{table}

Licences of the data: {licences}.

```python
import bnn_jax
import bnn_jax.zoo as zoo

network = zoo.load("digits_xnor_resnet6")
network.packed.predict(images)        # uint8 images, on bits
network.model, network.variables      # the Flax module, latent variables
network.record, network.class_names   # how it was trained, its classes
network.count_correct()               # the test set, classified again

# Training goes on from here, with the statistics of some hundred images:
start = network.variables_for(train_images)
bnn_jax.train(config, "runs/mine", warm_start=start)
```

`bnn-jax list pretrained` lists them, `bnn-jax evaluate zoo:digits_xnor_resnet6` evaluates one.
"""

NETWORKS_PAGE = """# Networks

How each is built, and the ways that a gradient has back through it. The pictures show a short instance, {shortened}:
boxes are binary products with their cost N in multiply-accumulates, arrows point as the activations go, the cheapest
path is coloured. [The zoo](index.md) has the numbers at the published sizes.
"""


class Picture(NamedTuple):
    """The file of a picture of gradient paths, its width, and what it shows in words; none without binary products."""

    file: str
    width: int
    text: str


def read(path: Path) -> Any:
    """The content of a file of results; an empty mapping if it is not there."""
    return json.loads(path.read_text()) if path.exists() else {}


def short_paper(paper: str) -> str:
    """First author and year of the first of some papers.

    >>> short_paper("Liu et al., Bi-Real Net, 2018, arXiv:1808.00278"), short_paper("as Zhu et al., A Title, TU Delft")
    ('Liu 2018', 'Zhu')
    """
    known = re.sub(r"arXiv:\S+", "", paper)
    author = re.search(r"([A-Z][\w\-]+) et al", known) or re.match(r"([\w\-]+)", known)
    year = re.search(r"\b(?:19|20)\d\d\b", known)
    return " ".join(found for found in (author and author[1], year and year[0]) if found)


def number(value: float | None, digits: int = 3) -> str:
    """A number with some significant digits, thousands apart; a dash for None.

    >>> number(11689.51), number(0.04512), number(None)
    ('11,690', '0.0451', '–')
    """
    if value is None:
        return DASH
    rounded = float(f"{value:.{digits}g}") if abs(value) < 1000 else round(value, -1)
    return f"{rounded:,.0f}" if abs(rounded) >= 100 else f"{rounded:g}"


def runs() -> dict[str, list[tuple[str, float, str]]]:
    """network -> (set, test accuracy, folder) of the comparisons of optimizers in results/, of the best row each."""
    found: dict[str, list[tuple[str, float, str]]] = {}
    for path in sorted((ROOT / "results").glob("*/results.json")):
        record = read(path)
        rows = [row for row in record["rows"] if any("test_accuracy_best" in run for run in row["runs"])]
        if record.get("compared", "optimizer") != "optimizer" or not rows:
            continue
        average = lambda row, name: mean(run[name] for run in row["runs"] if name in run)
        best = max(rows, key=lambda row: average(row, "validation_accuracy_best"))
        data, accuracy = record["config"]["data"]["name"], 100 * average(best, "test_accuracy_best")
        found.setdefault(record["config"]["model"]["name"], []).append((data, accuracy, path.parent.name))
    return found


def cells(name: str, size: Mapping[str, Any], ms: Mapping[str, float], sources: list[str], trained: Any) -> list[str]:
    """The cells of a network's row, as HTML."""
    extent, macs, costs = extent_of(name), size.get("macs", {}), size.get("costs", [])
    quantized = sum(macs.get(kind, 0) for kind in ("binary", "ternary", "multibit")) if macs else None
    scaled = lambda key, unit: None if key not in size else size[key] / unit
    times = ms["float32"] / ms["packed"] if "packed" in ms and "float32" in ms else None
    packs = size.get("megabits", 0) < 31e-6 * size.get("parameters", 0)  # of 32 bits all weights are real
    published = DASH
    if name in PUBLISHED:
        accuracy, source = PUBLISHED[name]
        sources += [] if source in sources else [source]
        place = sources.index(source) + 1
        published = f'{accuracy:g} <a href="#sources" title="{html.escape(source)}">[{place}]</a>'
    here = "<br>".join(
        f'<a href="../results/{folder}/report.html">{accuracy:.1f}</a> {html.escape(data)}'
        for data, accuracy, folder in trained
    )
    set_name = SETS.get(extent.image_shape, "text")
    return [
        f'<a href="networks.html#{name.replace("_", "-")}">{name.replace("_", "_<wbr>")}</a>',
        html.escape(short_paper(paper_of(name))),
        set_name,
        published,
        here or DASH,
        number(scaled("parameters", 1e6)),
        number(size.get("megabits")),
        number(None if quantized is None else quantized / 1e6) if quantized != 0 else DASH,
        number(macs["full_precision"] / 1e6 if macs else None),
        number(scaled("payload_bytes", 1e3)) if packs else DASH,
        number(ms.get("packed")),
        number(ms.get("float32")),
        number(times),
        number(costs[1] / 1e6 if len(costs) > 1 else None),
    ]


HEADINGS = ("network", "paper", "set", "published %", "here %", "M params", "Mbit", "MMAC quantized", "MMAC real")
HEADINGS += ("file kB", "packed ms", "float32 ms", "times as fast", "N_2nd")


def html_table(headings: tuple[str, ...], rows: list[list[str]], label: str) -> str:
    """A table as HTML, which scrolls sideways by itself and can be sorted."""
    head = "".join(f'<th scope="col">{heading}</th>' for heading in headings)
    body = "\n".join(
        f'<tr><th scope="row">{first}</th>' + "".join(f"<td>{cell}</td>" for cell in others) + "</tr>"
        for first, *others in rows
    )
    table = f'<table class="sortable zoo">\n<thead><tr>{head}</tr></thead>\n<tbody>\n{body}\n</tbody>\n</table>'
    wrapper = f'<div class="table-wrapper" tabindex="0" role="region" aria-label="{label}">'
    return f"```{{raw}} html\n{wrapper}\n{table}\n</div>\n```\n"


def machine_of(record: Mapping[str, Any]) -> str:
    """Where the latencies were measured, in words."""
    if not record:
        return "not measured yet."
    where = record["provenance"]
    model = where["cpu"].get("model", "a CPU")
    model += f" ({', '.join(where['cpu']['features'])})" if "features" in where["cpu"] else ""
    versions = f"jax {where['versions']['jax']}, commit {where['git']['commit'][:12]}"
    missing = len(record["not_measured"])
    missed = f" The {missing} networks that it did not reach in its time have a {DASH}." if missing else ""
    return f"{where['cpu']['cores']} cores of {model}, {versions}, {where['date'][:10]}.{missed}"


def pretrained_table() -> str:
    """The table of the pretrained networks."""
    lines = ["| name | network | data | test accuracy | file | trained by |", "|---|---|---|---|---|---|"]
    for name, record in PRETRAINED.items():
        accuracy = f"{100 * record.accuracy:.2f} % ({record.correct:,} of {record.examples:,})"
        size = f"{file_of(name).stat().st_size / 1e3:.1f} kB"
        source = f"`{record.source}`"
        if record.source.startswith("results/"):
            source = f"[{record.source.removeprefix('results/')}](../{record.source}/report.md)"
        how = f"{record.row}, {record.epochs} epochs, seed {record.seed}; {source}"
        network = f"[{record.network}](networks.md#{record.network.replace('_', '-')})"
        lines.append("| " + " | ".join((f"`{name}`", network, record.data, accuracy, size, how)) + " |")
    return "\n".join(lines)


def licences() -> str:
    """The licences of the data that pretrained networks saw."""
    used = dict.fromkeys(record.data for record in PRETRAINED.values())
    return "; ".join(f"{name}: {DATA[name].licence}" for name in used)


def index_page(sizes: Mapping[str, Any], latencies: Mapping[str, Any]) -> str:
    """The page with the table of all networks, and that of the pretrained ones."""
    by_name = {row["name"]: row for row in sizes.get("rows", [])}
    ms = {row["name"]: row["ms"] for row in latencies.get("network", [])}
    trained, sources = runs(), []
    rows = [cells(n, by_name.get(n, {}), ms.get(n, {}), sources, trained.get(n, [])) for n in MODELS]
    listed = "\n".join(f"{place}. {source}." for place, source in enumerate(sources, 1))
    text = (
        INTRODUCTION + PRETRAINED_PAGE.format(table=pretrained_table(), licences=licences()) + "\n## All networks\n\n"
    )
    text += html_table(HEADINGS, rows, "All networks") + LEGEND.format(machine=machine_of(latencies))
    return text + f"\n## Sources\n\n{listed}\n\n```{{toctree}}\n:hidden:\n\nnetworks\n```\n"


def shortened(name: str) -> Any:
    """A short instance of a network."""
    extent, taken = extent_of(name), settings_taken(name) or ()
    options = dict(extent.options) | {option: value for option, value in SHORT.items() if option in taken}
    if "rounding" in taken:
        options |= {"reduction": (2.0,), "rounding": 1}
    if name.startswith("bnas"):
        options.pop("stage_sizes", None)
    if name.startswith("ebireal"):
        options["stage_sizes"] = (2, 2)
    return build_model(name, num_classes=extent.num_classes, options=options)


def architecture(network: Any) -> str:
    """What decides the picture of a network: all of its fields but the quantizers, and whether there are any."""
    own = {f.name: getattr(network, f.name) for f in fields(network) if f.name not in ("parent", "name", "quantizers")}
    kinds = {name: own.pop(name, None) is not None for name in [n for n in own if n.endswith("_quantizer")]}
    return f"{type(network).__name__} {own} {kinds}"


def picture_of(network: Any, extent: Extent, path: Path, newest: float) -> Picture:
    """Draw the gradient paths of a network, unless the file is newer than the code."""
    shape, told = (1, *extent.image_shape), path.with_suffix(".txt")
    if not (told.exists() and path.exists() and told.stat().st_mtime > newest):
        path.parent.mkdir(parents=True, exist_ok=True)
        graph = path_graph(network, shape, train=False)
        found = smallest(graph)
        costs, lengths = (", ".join(texts) for texts in (map(short, found.costs), map(str, found.lengths)))
        draw_gradient_paths(network, shape, path, train=False)
        told.write_text(f"smallest costs N: {costs}; smallest lengths: {lengths}" if graph.operations else "")
    (width,) = struct.unpack(">I", path.read_bytes()[16:20])  # of the header of a PNG file
    return Picture(f"pictures/{path.name}", int(SCALE * width), told.read_text())


def call_of(name: str) -> str:
    """The call that builds a network as published."""
    extent = extent_of(name)
    options = f", options={extent.options!r}".replace("'", '"') if extent.options else ""
    return f'build_model("{name}", num_classes={extent.num_classes}{options})'


def section(name: str, picture: Picture) -> str:
    """The section of a network."""
    entry, line = MODELS[name], documented(MODELS[name].constructor)[0]
    quantizers = f"inputs `{entry.input_quantizer}`, weights `{entry.kernel_quantizer}`"
    paper = paper_of(name).replace("*", r"\*")
    alternative = f"Gradient paths of a short {name}: {picture.text}"
    facts = f"- Paper: {paper}\n- Quantizers: {quantizers}\n- Image: {'x'.join(map(str, extent_of(name).image_shape))}"
    if not picture.text:
        return f"## {name}\n\n{line}\n\n```python\n{call_of(name)}\n```\n\n{facts}\n\nNo binary products.\n"
    picture_block = f"```{{image}} {picture.file}\n:alt: {alternative}\n:width: {picture.width}px\n:loading: lazy\n```"
    return f"## {name}\n\n{line}\n\n```python\n{call_of(name)}\n```\n\n{facts}\n\n{picture_block}\n"


def sections(folder: Path) -> Iterator[str]:
    """The sections of all networks; those of one architecture share a picture."""
    newest = max(path.stat().st_mtime for path in (ROOT / "bnn_jax").rglob("*.py"))
    drawn: dict[str, Picture] = {}
    for name in MODELS:
        network = shortened(name)
        key = architecture(network)
        if key not in drawn:
            drawn[key] = picture_of(network, extent_of(name), folder / "pictures" / f"{name}.png", newest)
        yield section(name, drawn[key])


def generate(app: "Sphinx") -> None:
    """Write the pages of the zoo."""
    folder = Path(app.srcdir) / "zoo"
    write(folder / "index.md", index_page(read(SIZES), read(LATENCIES)))
    introduction = NETWORKS_PAGE.format(shortened="with one block a stage where it has stages")
    build = "```python\nfrom bnn_jax.models.build import build_model\n```\n"
    write(folder / "networks.md", "\n".join([introduction, build, *sections(folder)]))


def setup(app: "Sphinx") -> dict[str, Any]:
    app.connect("builder-inited", generate)
    return {"parallel_read_safe": True}
