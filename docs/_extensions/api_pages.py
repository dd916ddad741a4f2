"""Pages that are made from the package's own tables before the documentation is built."""

import importlib
import inspect
import pkgutil
from pathlib import Path
from typing import Any

from pages import write
from sphinx.application import Sphinx

import bnn_jax

PACKAGES = {
    "estimators": "step functions with a chosen derivative",
    "quantizers": "codes and scales of weights, activations and gradients",
    "layers": "binary layers, normalization, pooling",
    "models": "networks of the literature",
    "optim": "Deep Frank-Wolfe, other optimizers, the box",
    "losses": "losses, and which of them an exact step takes",
    "training": "one run: config, step, loop, checkpoints",
    "stages": "recipes in several stages, teachers",
    "sweeps": "grids, seeds, comparisons, tuning",
    "data": "where images come from",
    "packed": "networks on bits: freeze, verify, save, export",
    "zoo": "trained networks that come with the package",
    "bitops": "XNOR and popcount",
    "analysis": "sizes, operations, gradient paths, reports",
    "tracing": "what a traced network does",
    "convert": "weights from PyTorch, larq and .npz",
}


def public_names(module: Any) -> list[str]:
    """What a module defines for others, in the order of its source."""
    names = getattr(module, "__all__", None)
    if names is None:
        own = [name for name, value in vars(module).items() if getattr(value, "__module__", None) == module.__name__]
        names = [name for name in own if not name.startswith("_")]
    return [name for name in names if not inspect.ismodule(getattr(module, name))]


def api_page(package: str, summary: str) -> str:
    """The page of a package: what it exports, then what else its modules define."""
    module = importlib.import_module(f"bnn_jax.{package}")
    lines = [f"# bnn_jax.{package}", "", f"{summary[0].upper()}{summary[1:]}.", ""]
    exported = public_names(module)

    def section(name: str, excluded: list[str]) -> list[str]:
        options = [":members:"] + ([f":exclude-members: {', '.join(excluded)}"] if excluded else [])
        if name.rpartition(".")[2] in exported:  # a function has the name of its module
            options.append(":no-index:")
        body = [f".. automodule:: {name}", *(f"   {option}" for option in options)]
        return ["```{eval-rst}", *body, "```", ""]

    lines += section(module.__name__, [])
    if hasattr(module, "__path__"):
        for found in sorted(pkgutil.walk_packages(module.__path__, f"{module.__name__}."), key=lambda info: info.name):
            if found.name.rsplit(".", 1)[1].startswith("_"):
                continue
            own = importlib.import_module(found.name)
            if set(public_names(own)) - set(exported):
                lines += [f"## {found.name}", "", *section(found.name, [n for n in public_names(own) if n in exported])]
    return "\n".join(lines)


def generate(app: Sphinx) -> None:
    """Write all generated pages under `api/`."""
    folder = Path(app.srcdir) / "api"
    packages = [name for name in PACKAGES if importlib.util.find_spec(f"bnn_jax.{name}")]
    for package in packages:
        write(folder / f"{package}.md", api_page(package, PACKAGES[package]))
    listed = "\n".join(f"- [bnn_jax.{name}]({name}.md): {PACKAGES[name]}" for name in packages)
    toc = "\n".join(packages)
    text = f"# API\n\nVersion {bnn_jax.__version__}.\n\n{listed}\n\n```{{toctree}}\n:hidden:\n\n{toc}\n```\n"
    write(folder / "index.md", text)


def setup(app: Sphinx) -> dict[str, Any]:
    app.connect("builder-inited", generate)
    return {"parallel_read_safe": True}
