"""Comparisons as scripts make them: rows by name, what each network costs, the report."""

import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeAlias

from bnn_jax.analysis.accounting import REAL_BITS, account_model
from bnn_jax.analysis.gradient_paths import module_gradient_paths
from bnn_jax.analysis.provenance import provenance
from bnn_jax.analysis.published_sizes import WEIGHTS
from bnn_jax.analysis.report import print_report, write_report
from bnn_jax.analysis.tables import Tables
from bnn_jax.cli.options import ComparisonOptions, command_line, refuse_unread
from bnn_jax.compilation import use_compilation_cache
from bnn_jax.errors import UsageError, unknown_name
from bnn_jax.estimators import ESTIMATORS, Estimator
from bnn_jax.extras import import_extra
from bnn_jax.losses import as_loss
from bnn_jax.names import import_named, is_import, last_part
from bnn_jax.optim import as_optimizer
from bnn_jax.outputs import outputs_of
from bnn_jax.paths import folder_name
from bnn_jax.quantizers.quantizer import takes_array
from bnn_jax.sweeps.comparison import compare
from bnn_jax.sweeps.results import Results
from bnn_jax.training.config import Config, config_module, load_config, running, select_optimizer
from bnn_jax.training.experiment import make_model
from bnn_jax.training.overrides import changed_settings, check_applied, check_not_tuned
from bnn_jax.training.validation import validate

SIGNS = [name for name, estimator in ESTIMATORS.items() if estimator.code_set == (-1, 1)]

Rows: TypeAlias = dict[str, tuple[Config, dict[str, str]]]
"""label -> config, and further cells of the table by their header."""

Described: TypeAlias = dict[str, dict[str, Any]]
"""The `columns` of a row of the results, and its `gradient_paths`."""


def optimizer_rows(config: Config, optimizers: Iterable[str], losses: Mapping[str, dict[str, Any]]) -> Rows:
    """A row for each optimizer whose settings the config keeps, and each loss; an exact step only with a hinge.

    A row of the first loss is labelled by its optimizer, one of another loss by both.

    Args:
      config: of all rows.
      optimizers: their names.
      losses: name -> options.

    Raises:
      UsageError: for one without settings, and one that is named twice.
    """
    rows, first = {}, next(iter(losses))
    chosen = [select_optimizer(config, name) for name in optimizers]
    labels = _labels("optimizers", [optim.name for optim in chosen])
    for loss, options in losses.items():
        for optim, label in zip(chosen, labels):
            if loss == first or not as_optimizer(optim.name).exact_step or as_loss(loss).piecewise_linear:
                label = label if loss == first else f"{label}-{last_part(loss)}"
                rows[label] = (replace(config, optim=optim, loss=loss, loss_options=options), {})
    return rows


def _labels(argument: str, names: list[Any]) -> list[str]:
    """The last part of each name, the whole one where two have the same; they are folders too.

    Raises:
      UsageError: for no name, and one that is given twice.
    """
    if not names:
        raise UsageError(f"`{argument}` must name at least one; leave it out for the usual ones")
    if len(set(names)) < len(names):
        given = " ".join(map(str, names))
        raise UsageError(f"`{argument}` (={given}) must differ from each other; leave one out")
    short = [last_part(name) for name in names]
    return [part if short.count(part) == 1 else folder_name(str(name)) for part, name in zip(short, names)]


def estimator_rows(config: Config, estimators: Iterable[str], quantizes: str) -> Rows:
    """A row for each estimator of the sign family, in its place of `config`: inputs, kernels or both."""
    rows, config, estimators = {}, validate(config), list(estimators)
    for name, label in zip(estimators, _labels("estimators", estimators)):
        if not _is_sign(name):
            raise unknown_name("estimators", name, SIGNS)
        model = config.model
        if quantizes != "kernels":
            model = replace(model, input_quantizer=name, input_quantizer_options={})
        if quantizes != "inputs":
            model = replace(model, kernel_quantizer_options=model.kernel_quantizer_options | {"estimator": name})
        rows[label] = (replace(config, model=model), {})
    return rows


def rows_of_config(options: ComparisonOptions, labels: Iterable[str]) -> Rows | None:
    """The rows that the config's `get_rows(config)` makes, those of `labels` or all; None if it has no such function.

    Raises:
      UsageError: for a label that no row has, an override that no row takes, and a function that raises an error or
        returns something else.
    """
    get_rows = getattr(config_module(options.config), "get_rows", None)
    if get_rows is None:
        return None

    def make(config: Config) -> Rows:
        with running(options.config):
            rows = get_rows(config)
        if not (isinstance(rows, Mapping) and rows and all(map(_is_row, rows.items()))):
            raise UsageError(
                f"`--config` (={options.config}) must have a get_rows(config) that returns rows, each as label: "
                "(Config, {header: cell})"
            )
        return rows

    rows = make(options.settings)
    for label in labels:
        if label not in rows:
            raise unknown_name("rows", label, rows)
    before = load_config(options.config)
    check_applied(before, options.settings, make, f"get_rows() of {options.config}")
    rows = {label: rows[label] for label in rows if label in labels or not labels}
    if options.tune:
        changed = changed_settings(before, options.settings)
        check_not_tuned(changed, {name for cell, _ in rows.values() for name in cell.optim.tune})
    return rows


def _is_row(item: tuple[Any, Any]) -> bool:
    label, row = item
    pair = isinstance(row, tuple) and len(row) == 2
    return isinstance(label, str) and pair and isinstance(row[0], Config) and isinstance(row[1], Mapping)


def estimator_rows_of(options: ComparisonOptions, labels: Iterable[str]) -> Rows:
    """:func:`rows_of_config`, or :func:`estimator_rows` of a config that has none.

    Args:
      options: with `estimators` and `quantizes`, for :func:`estimator_rows`.
      labels: of the rows of the config.

    Raises:
      UsageError: for an option that is of the other way to make rows, and an override that no row takes.
    """
    rows = rows_of_config(options, labels)
    if rows is not None:
        refuse_unread(options, ("estimators", "quantizes"), f"is for a config without get_rows(), not {options.config}")
        return rows
    refuse_unread(options, ("rows",), f"is for a config with get_rows(), not {options.config}")

    def make(config: Config) -> Rows:
        return estimator_rows(config, options.estimators, options.quantizes)

    check_applied(load_config(options.config), options.settings, make, "each row")
    return make(options.settings)


def optimizer_rows_of(options: ComparisonOptions, labels: Iterable[str]) -> Rows:
    """:func:`rows_of_config`, or :func:`optimizer_rows` of a config that has none.

    Args:
      options: with `optimizers`, for :func:`optimizer_rows`; of the default ones those that the config keeps.
      labels: of the rows of the config.

    Raises:
      UsageError: for an option that is of the other way to make rows, and an override that no row takes.
    """
    rows = rows_of_config(options, labels)
    if rows is not None:
        refuse_unread(options, ("optimizers",), f"is for a config without get_rows(), not {options.config}")
        return rows
    refuse_unread(options, ("rows",), f"is for a config with get_rows(), not {options.config}")
    config, before = options.settings, load_config(options.config)
    losses = {before.loss: before.loss_options} | {config.loss: config.loss_options}
    names = options.optimizers
    if names == type(options).optimizers:
        kept = {optim.name for optim in (*config.optimizers, config.optim)}
        names = [name for name in names if name in kept] or names
        if missing := [name for name in options.optimizers if name not in names]:
            print(f"compared without {', '.join(missing)}, for which the config keeps no settings", file=sys.stderr)
    return optimizer_rows(config, names, losses)


def architecture_rows(options: ComparisonOptions, labels: Iterable[str]) -> Rows:
    """:func:`rows_of_config` of a config that must have them."""
    rows = rows_of_config(options, labels)
    if rows is None:
        raise UsageError(f"`--config` (={options.config}) must define a function get_rows(config), the networks")
    return rows


def weight_bits(network: Any, image_shape: tuple[int, ...]) -> Described:
    """The bits of the weights of the frozen network.

    Beside convolutions real matrices are left out, as in So's survey of gradient estimators.
    """
    account = account_model(network, image_shape)
    matrices = [layer for layer in account.layers if not layer.convolution]
    if account.convolution_bits:
        matrices = [layer for layer in matrices if layer.weight_bits < REAL_BITS]
    bits = account.convolution_bits + sum(layer.weights * layer.weight_bits for layer in matrices)
    return {"columns": {"weight bits": f"{bits:,}"}}


def costs_and_paths(network: Any, image_shape: tuple[int, ...]) -> Described:
    """Storage and operations of a network for one image, and the gradient paths of it and of its first stage."""
    account = account_model(network, image_shape)
    columns = {
        "storage (kbit)": f"{account.bits(WEIGHTS) / 1e3:,.1f}",
        "binary MACs (10^6)": f"{account.macs().binary / 1e6:.4g}",
        "FLOPs (10^6)": f"{account.flops(WEIGHTS) / 1e6:.4g}",
    }
    first_stage = lambda found: outputs_of(found).intermediates.get("stage1", outputs_of(found).logits)
    shape = (1, *image_shape)
    paths = {
        "whole network": module_gradient_paths(network, shape, train=False),
        "first stage": module_gradient_paths(network, shape, train=False, output=first_stage),
    }
    for place, (costs, lengths) in paths.items():
        columns[f"N of the {place} (10^6)"] = ", ".join(f"{cost / 1e6:.3g}" for cost in costs)
        columns[f"L of the {place}"] = ", ".join(map(str, lengths))
    return {"columns": columns, "gradient_paths": {place: found._asdict() for place, found in paths.items()}}


def sign_estimators(rows: Rows) -> list[str]:
    """The estimators of the sign family that the rows use, for their picture."""
    used = []
    for cell, _ in rows.values():
        model = validate(cell).model
        used += [model.input_quantizer, model.kernel_quantizer_options.get("estimator", "ste_sign")]
    return list(filter(_is_sign, dict.fromkeys(used)))


def _is_sign(name: str | None) -> bool:
    """Whether a name is that of an estimator of the sign family, in the table or to import."""
    if not is_import(name):
        return name in SIGNS
    found = import_named("estimators", name)
    return isinstance(found, Estimator) or (callable(found) and takes_array(found))


def run_comparison(
    options: ComparisonOptions,
    rows: Rows,
    *,
    compared: str,
    name: str,
    describe: Callable[[Any, tuple[int, ...]], Described] | None = None,
    estimators: list[str] | None = None,
) -> None:
    """Train every row with every seed, write the report into the workdir and print its table.

    Args:
      options: of the script.
      rows: of the comparison.
      compared: what a row is: optimizer, estimator or architecture.
      name: of the comparison, and of its folder in runs/ if the options name no other.
      describe: what the table says of a row's network, from the network and the shape of an image; where the rows are
        networks, the config file's NOTES follow the table.
      estimators: those to draw.
    """
    import_extra("matplotlib", "the report")  # Missed now, not when all is trained.
    use_compilation_cache()
    workdir = options.workdir or Path("runs") / name
    cells = {label: cell for label, (cell, _) in rows.items()}

    def described(label: str, cell: Config, data: dict[str, Any]) -> dict[str, Any]:
        network = make_model(cell.model, num_classes=data["num_classes"])
        found = describe(network, tuple(data["shape"])) if describe else {}
        return found | {"columns": found.get("columns", {}) | rows[label][1]}

    made = {"seeds": options.seeds, "tune": options.tune, "describe": described}
    with options.tables() as tables:
        results = compare(cells, workdir, **made, **options.engine())
        notes = getattr(config_module(options.config), "NOTES", "") if describe else ""
        results = replace(results, compared=compared, notes=notes, estimators=estimators or [])
        report(results, name, workdir, tables)


def report(results: Results, name: str, workdir: Path, tables: Tables) -> None:
    """Write the report of what this command found, and print its table and the names of its files."""
    results = replace(results, name=name, command=command_line(), provenance=provenance())
    files = write_report(results, workdir)
    print_report(results, tables)
    print(f"{workdir}: {', '.join(files)}")
