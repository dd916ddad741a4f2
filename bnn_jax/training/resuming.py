"""What may differ between two parts of a run: settings that change no number, and how long it is."""

import inspect
from typing import Any

from bnn_jax.layers.arguments import QUANTIZERS
from bnn_jax.layers.by_layer import LayerQuantizers
from bnn_jax.models import MODELS
from bnn_jax.models.build import entry_of
from bnn_jax.optim import as_optimizer
from bnn_jax.quantizers import make_quantizer
from bnn_jax.schedules import make_schedule
from bnn_jax.training.config import Config, flatten, to_dict
from bnn_jax.training.validation import with_published_quantizers

CHANGE_NO_NUMBER = (
    "name",
    "data.data_dir",
    "init_from",
    "scan_steps",
    "checkpoint_every_epochs",
    "diagnostics",
    "optimizers",
    "optim.tune",
    "tune_trials",
    "tune_epochs",
)
"""Settings, and groups of them, with any value of which a run goes on to the same parameters."""


def differing_key(recorded: Config, config: Config) -> str | None:
    """The first setting in which `config` is another run than the recorded one; more epochs alone are the same run."""
    a, b = flatten(to_dict(recorded)), flatten(to_dict(config))
    keys = [key for key in sorted(a | b) if a.get(key) != b.get(key) and not _changes_no_number(key)]
    others = [key for key in keys if key != "epochs"]
    return next(iter(others), "epochs" if config.epochs < recorded.epochs else None)


def _changes_no_number(key: str) -> bool:
    return any(f"{key}.".startswith(f"{name}.") for name in CHANGE_NO_NUMBER)


def setting(config: Config, key: str) -> Any:
    """The value of a setting by its dotted name, as JSON has it; None where there is none."""
    return flatten(to_dict(config)).get(key)


def what_spans_the_run(config: Config, epochs: int) -> str | None:
    """What in a config is laid over the whole run, and would be another thing over `epochs` epochs, in words.

    None where a run that goes on for more epochs is, bit for bit, the longer run that was started with them: its
    schedules are constant, there is no warm-up, and nothing in network and optimizer follows the share of the run that
    is done.
    """
    optim = config.optim
    curves = [("learning rate", optim.schedule, optim.learning_rate, optim.schedule_options, optim.warmup_share)]
    if config.regularizer != "none":
        strength = (config.regularizer_schedule, config.regularizer_strength, config.regularizer_schedule_options)
        curves.append(("strength of the regularizer", *strength, 0.0))
    for what, schedule, value, options, warmup in curves:
        if schedule != "constant" or warmup > 0:
            name = f"schedule is {schedule}" + (f" after a warm-up over {warmup:g} of the run" if warmup > 0 else "")
            # In parts of an epoch, which are as good as steps.
            old, new = (
                make_schedule(schedule, value, 1000 * length, warmup_share=warmup, **options)(1000 * config.epochs)
                for length in (config.epochs, epochs)
            )
            return (
                f"its {what} follows a curve over the whole run, whose {name}: after {config.epochs} epochs it is "
                f"{float(old):.3g} on the curve over {config.epochs} and {float(new):.3g} on that over {epochs}"
            )
    if as_optimizer(optim.name).spans_the_run:
        return f"{optim.name} reaches the bounds at the end of them"
    follower = _follows_the_run(config)
    return follower and f"{follower} follows the share of the run that is done"


def _follows_the_run(config: Config) -> str | None:
    model = with_published_quantizers(config.model)
    for kind, table in QUANTIZERS.items():
        named, options = getattr(model, kind), getattr(model, f"{kind}_options")
        if _wants_progress(make_quantizer(table, named, **options)):
            return f"`model.{kind}` (={named})"
    for pattern, of_layers in LayerQuantizers(dict.fromkeys(QUANTIZERS), model.quantizers).patterns.items():
        if any(map(_wants_progress, of_layers.values())):
            return f"`model.quantizers` of {pattern}"
    if isinstance(model.name, str) and model.name in MODELS:
        return None
    # Quantizers inside of a network of the user's own are not seen from here.
    network = entry_of(model.name).constructor
    blind = isinstance(network, type) and "progress" not in inspect.signature(network.__call__).parameters
    return None if blind else f"`model.name` (={model.name}), for all that is known,"


def _wants_progress(quantizer: Any) -> bool:
    return "progress" in getattr(quantizer, "wants", ())
