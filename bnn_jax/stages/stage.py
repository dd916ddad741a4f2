"""Training in stages: each one an ordinary run that may start from, and be taught by, a run before it.

A workdir holds a folder a stage, each that of an ordinary run (see `bnn_jax.training.loop`) and `stage.json`: from
which variables, named by their hash, the stage started, which of them it took over, and who taught it.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from bnn_jax.checks import look_up, require
from bnn_jax.data import Dataset, ImageStream
from bnn_jax.errors import UsageError, unknown_name
from bnn_jax.paths import local_path
from bnn_jax.stages.teachers import fingerprint, load_network
from bnn_jax.stages.warm_start import TRANSFERS, Transfer, Variables, WarmStart
from bnn_jax.training.callbacks import CSVLogger, TensorBoard, check_callbacks
from bnn_jax.training.config import Config
from bnn_jax.training.input_pipeline import load_data, with_data
from bnn_jax.training.loop import train
from bnn_jax.training.programs import Teacher, programs_of, state_shapes
from bnn_jax.training.progress import OnProgress, silent
from bnn_jax.training.run_folder import has_begun, recorded
from bnn_jax.training.state import WHICH
from bnn_jax.training.validation import validate


@dataclass(frozen=True)
class Stage:
    """One stage of a recipe.

    Attributes:
      name: of the stage and of its folder.
      config: the run, complete: its own network, quantizers, optimizer, epochs and losses.
      initialise_from: name of an earlier stage, or folder of a finished run; None starts from random weights.
      teacher: name of an earlier stage, or folder of a finished run, whose network teaches the losses of
        `config.distillation`; it sees the same images, in evaluation mode, and does not change.
      transfer: how variables are taken over: a name of TRANSFERS, or a function.
      which: variables of `initialise_from` and `teacher`: "best", those of the best validation epoch, or "last".
    """

    name: str
    config: Config
    initialise_from: str | None = None
    teacher: str | None = None
    transfer: str | Transfer = "by_name"
    which: Literal["best", "last"] = "best"


def check_stages(stages: Sequence[Stage]) -> None:
    """Check what can be checked before anything runs.

    Raises:
      UsageError: for a config that cannot run, a name that is taken or no folder's, a run that is not there, an unknown
        transfer, losses of a teacher without one, or the reverse; for what is no list of stages.
    """
    if not stages:
        raise UsageError("`stages` is empty; give at least one Stage")
    wrong = [stages] if isinstance(stages, Stage | str) else [one for one in stages if not isinstance(one, Stage)]
    if wrong:
        rule = f"of type {type(wrong[0]).__name__}, must be Stages in a list"
        raise UsageError(
            f"`stages`, {rule}; RECIPES['reactnet'](load_config('digits_xnor')) of bnn_jax.stages.recipes makes one"
        )
    earlier: list[str] = []
    for stage in stages:
        validate(stage.config)
        if not earlier and stage.initialise_from is not None:
            rule = f"does not go with `initialise_from` (={stage.initialise_from!r}) of stage {stage.name!r}"
            init_from = stage.config.init_from
            require("init_from", init_from, init_from is None, rule, "give one of them", error=UsageError)
        where = f"of stage {stage.name!r}"
        if not re.fullmatch(r"\w[\w.-]*", stage.name) or stage.name in earlier:
            raise UsageError(f"`name` (={stage.name!r}) must be new and made of letters, digits, _, - and .")
        look_up(f"transfer {where}", stage.transfer, TRANSFERS)
        require("which", stage.which, stage.which in WHICH, f"{where} must be best or last", error=UsageError)
        for argument, name in (("initialise_from", stage.initialise_from), ("teacher", stage.teacher)):
            if name is not None and name not in earlier and not (local_path(argument, name) / "result.json").exists():
                known = ", ".join(earlier) or "none"
                raise UsageError(
                    f"`{argument}` (={name!r}) {where} must be an earlier stage ({known}) or the folder of a "
                    "finished run"
                )
        if (stage.teacher is None) != (not stage.config.distillation.losses):
            raise UsageError(
                f"`teacher` (={stage.teacher!r}) {where} must be given exactly if its config has `distillation.losses` "
                f"(={stage.config.distillation.losses})"
            )
        earlier.append(stage.name)


def run_stages(
    stages: Sequence[Stage],
    workdir: str | Path,
    *,
    data: Any | None = None,
    on_progress: OnProgress = silent,
    announce: Callable[[str], None] = lambda text: None,
    **training: Any,
) -> dict[str, dict[str, Any]]:
    """Run the stages in order, or resume them; finished ones are not run again.

    Args:
      stages: a stage may name those before it.  `init_from` of their configs is what the first one starts from.
      workdir: each stage has its own folder in it, `<name>`.
      data: of all stages, as :func:`bnn_jax.training.loop.train` takes them; None loads what their configs name.
      on_progress: as that of :func:`bnn_jax.training.loop.train`, of the stage under way.
      announce: told in one sentence what each stage starts from.
      **training: `callbacks`, `devices`, `workers` and `strict` of :func:`bnn_jax.training.loop.train`, for all stages.

    Returns:
      The result of each stage, by its name.

    Raises:
      UsageError: as :func:`check_stages`; for a callback that would write all stages into one file; if a stage can take
        over nothing from the one it starts from; if a stage was begun with another config, or from variables that are
        not those of its predecessor any more.
      RunError: as :func:`bnn_jax.training.loop.train`.
    """
    workdir = local_path("workdir", workdir)
    check_stages(stages)
    check_callbacks(training.get("callbacks", ()))
    for callback in training.get("callbacks", ()):
        argument = {CSVLogger: "path", TensorBoard: "folder"}.get(type(callback))
        if argument and len(stages) > 1:
            place, rule = getattr(callback, argument), f"of {type(callback).__name__} is for one run alone"
            way = "leave it out to have one in the folder of each stage"
            require(argument, place, place is None, rule, way, error=UsageError)
    folders, loaded = {stage.name: workdir / stage.name for stage in stages}, {}
    results: dict[str, dict[str, Any]] = {}
    for number, stage in enumerate(stages, start=1):
        config, dataset = with_data(stage.config, data)
        if number > 1:
            config = replace(config, init_from=None, init_options={}, init_sha256=None)
        if dataset is None:
            dataset = loaded[config.data] = loaded.get(config.data) or load_data(config.data)
        elif data is not None:
            data = dataset
        stage = replace(stage, config=config)
        label = f"stage {number}/{len(stages)} {stage.name}"
        origin, teacher = (
            None if name is None else load_network(folders.get(name, name), dataset, which=stage.which)
            for name in (stage.initialise_from, stage.teacher)
        )
        start = None if origin is None else _warm_start(stage, origin.variables, dataset)
        record = _record_of(stage, origin, teacher, start)
        _check_record(stage, folders[stage.name], record)
        announce(f"{label}: {_describe(stage, start)}")
        results[stage.name] = train(
            stage.config,
            folders[stage.name],
            data=dataset,
            on_progress=lambda done, total, text, label=label: on_progress(done, total, f"{label}  {text}"),
            warm_start=None if start is None else start.variables,
            teacher=teacher,
            stage=record,
            **training,
        )
    return results


def replace_stage(stages: Sequence[Stage], name: str, folder: str | Path) -> list[Stage]:
    """The stages without the one of that name, a finished run taking its place for those after it.

    Stages before it that led to nothing else are left out too.

    Raises:
      UsageError: if there is no such stage, or none is left.
    """
    folder = local_path("folder", folder)
    if name not in [stage.name for stage in stages]:
        raise unknown_name("stage", name, [stage.name for stage in stages])
    left_out = {name}
    for stage in reversed(stages):
        led_to = {other.name for other in stages if stage.name in (other.initialise_from, other.teacher)}
        left_out |= {stage.name} if led_to and led_to <= left_out else set()
    rest = [stage for stage in stages if stage.name not in left_out]
    rule = "leaves nothing to train, for all other stages only lead to it"
    require("stage", name, len(rest) > 0, rule, "name another stage", error=UsageError)

    def other(reference):
        return str(folder) if reference == name else reference

    return [
        replace(stage, initialise_from=other(stage.initialise_from), teacher=other(stage.teacher)) for stage in rest
    ]


def _warm_start(stage: Stage, source: Variables, dataset: Dataset | ImageStream) -> WarmStart:
    """What `stage` takes over from the variables `source`.

    Raises:
      UsageError: if that is nothing.
    """
    like = state_shapes(programs_of(stage.config, dataset)).train
    transfer = look_up("transfer", stage.transfer, TRANSFERS)
    start = transfer(source, {"params": like.params, **like.model_state})
    if not start.names:
        name, reason = next(iter(start.initialised.items()))
        raise UsageError(
            f"`initialise_from` (={stage.initialise_from!r}) of stage {stage.name!r} has nothing to take over: no "
            f"variable agrees in name and shape, {name} is {reason}; choose networks of one family and width"
        )
    return start


def _describe(stage: Stage, start: WarmStart | None) -> str:
    if start is None:
        said = f"starts from {stage.config.init_from or 'random weights'}"
    else:
        said = f"takes {len(start.names)} variables from {stage.initialise_from}"
        said += f", {len(start.initialised)} are initialised" if start.initialised else ""
    return said + (f"; taught by {stage.teacher}" if stage.teacher else "")


def _record_of(
    stage: Stage, origin: Teacher | None, teacher: Teacher | None, start: WarmStart | None
) -> dict[str, Any]:
    """What `stage.json` holds."""

    def run(name, network):
        hashed = None if network is None else fingerprint(network.variables)
        return None if network is None else {"run": name, "which": stage.which, "sha256": hashed}

    named = isinstance(stage.transfer, str)
    return {
        "initialise_from": run(stage.initialise_from, origin),
        "transfer": stage.transfer if named else getattr(stage.transfer, "__name__", "function"),
        "teacher": run(stage.teacher, teacher),
        "carried": None if start is None else list(start.names),
        "initialised": None if start is None else start.initialised,
        "unused": None if start is None else list(start.unused),
    }


def _check_record(stage: Stage, folder: Path, record: dict[str, Any]) -> None:
    """Refuse a folder with a run that is no stage, or a stage that was begun from something else.

    Raises:
      UsageError: for one.
    """
    if not has_begun(folder):
        return
    begun = recorded(folder, "stage")
    if not begun and (folder / "config.json").exists():
        raise UsageError(f"`workdir` holds a run in {folder} that is no stage; choose another `--workdir`")
    found = begun[0] if begun else record
    differing = [key for key, value in record.items() if _unplaced(found.get(key)) != _unplaced(value)]
    if differing:
        key = differing[0]
        raise UsageError(
            f"`{key}` of stage {stage.name!r} is not what {folder} was begun with: {_short(record[key])} now, "
            f"{_short(found.get(key))} then; remove {folder} to run the stage anew, or choose another `--workdir`"
        )


def _unplaced(value: Any) -> Any:
    """What a record says of a run but the path to it: a run that lies elsewhere now is known by its hash."""
    return {key: own for key, own in value.items() if key != "run"} if isinstance(value, dict) else value


def _short(value: Any) -> str:
    if isinstance(value, dict) and "sha256" in value:
        return f"the {value['which']} variables of {value['run']} with hash {value['sha256'][:8]}"
    return "another list" if isinstance(value, (dict, list)) else repr(value)
