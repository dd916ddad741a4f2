"""Put a number that means nothing into a state: python tests/fuzz/broken_states.py --mutations 200

NaN, infinity or 1e30 takes the place of one number of a random array, and what takes a state is called on it:

    state       of a run, as a step at a random moment leaves it: parameters, statistics, states of quantizers and of
                the optimizer, averages.  The run goes on from it in the loop, it is saved, its network is frozen,
                written to a file and verified against the packed one of the healthy run.
    checkpoint  of a finished run, with a right hash: the run is evaluated, frozen, and resumed.
    packed      variables of a frozen network: they are saved and verified; and with them a file, its hash made right
                again, is loaded.

NaN and infinity come also between two steps of one compiled call, where nothing looks and they have to last until its
end; 1e30 only where a call hands its state on, for within one the box may make a weight of it that is as good as any.

A call must end with one sentence that tells what is not finite, or with a warning that does.  It may end as it does on
the healthy state, to the bit ("no effect").  Whatever else it ends with, a number that nobody doubts, is a silent pass;
an error that is no UsageError, RunError or ValueError of one such sentence is a traceback.  Ends with exit code 1 if
there is either.
"""

import shutil
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import tyro

sys.path.insert(0, str(Path(__file__).parents[1]))
from fuzz_artifact import checksummed, opened
from small_sets import brightness_set, write_npz

from bnn_jax.compilation import use_compilation_cache
from bnn_jax.data import Dataset, normalize
from bnn_jax.errors import RunError, UsageError, exit_code_of
from bnn_jax.finite import KINDS, leaf_name
from bnn_jax.packed import PackedModel, freeze, load, save, verify
from bnn_jax.packed.runs import freeze_run
from bnn_jax.training import loop
from bnn_jax.training.checkpoint import restore_checkpoint, save_checkpoint
from bnn_jax.training.config import Config, DataConfig, ModelConfig, OptimConfig
from bnn_jax.training.evaluation import evaluate_run
from bnn_jax.training.input_pipeline import load_data
from bnn_jax.training.loop import train
from bnn_jax.training.members import steps_done
from bnn_jax.training.programs import image_info, programs_of, state_shapes
from bnn_jax.training.run_folder import read_config, save_run
from bnn_jax.training.state import RunState

MLP = ModelConfig("mnist_mlp", width=4, options={"hidden_layers": 1, "input_dropout": 0.0, "hidden_dropout": 0.0})
RESNET = ModelConfig("resnet6", width=2)
RUNS = {
    "dfw": (RESNET, OptimConfig("dfw", 0.3)),
    "adam": (replace(MLP, kernel_quantizer="c_sign"), OptimConfig("adam", 0.01, ema_decay=0.9)),
    "sgd": (replace(MLP, kernel_quantizer="rbnn", input_quantizer="tbn"), OptimConfig("sgd", 0.1)),
    "bop": (MLP, OptimConfig("bop", 0.01)),
}
"""Networks and optimizers, so that there are states of quantizers and of each kind of optimizer."""
EPOCHS, STEPS, SCAN_STEPS = 2, 4, 3
VALUES = {"NaN": np.nan, "infinity": np.inf, "1e30": 1e30}
TOLD, HARMLESS = "told", "no effect"
BAD = ("SILENT", "TRACEBACK", "UNCLEAR")


@dataclass(frozen=True)
class Arguments:
    mutations: int = 200
    seed: int = 0
    runs: tuple[str, ...] = tuple(RUNS)
    """Which networks and optimizers."""


@dataclass
class Healthy:
    """A finished run that nothing happened to."""

    config: Config
    dataset: Dataset
    folder: Path
    result: dict[str, Any]
    run: RunState
    metadata: dict[str, Any]
    evaluated: dict[str, Any]
    model: nn.Module
    packed: Any
    file: bytes

    def description(self) -> dict[str, Any]:
        """What a file tells beside the variables."""
        info = image_info(self.dataset)._asdict()
        info["image_shape"] = info.pop("shape")
        return {"model": vars(self.config.model), **info}


def healthy_run(name: str, folder: Path) -> Healthy:
    """Train a run, and keep what mutations start from."""
    model, optim = RUNS[name]
    data = DataConfig(write_npz(brightness_set(16 * STEPS, 20, 20), folder / f"{name}.npz"))
    dataset = load_data(data)
    config = Config(name, EPOCHS, 16, data=data, model=model, optim=optim, scan_steps=SCAN_STEPS)
    result = timeless(train(config, folder / name, data=dataset))
    config = read_config(folder / name)
    like = state_shapes(programs_of(config, dataset))
    restored = restore_checkpoint(folder / name / "checkpoints", like)
    frozen = freeze_run(folder / name)
    evaluated = evaluate_run(folder / name)
    state = (restored.state, restored.metadata)
    healthy = Healthy(config, dataset, folder / name, result, *state, evaluated, frozen.model, frozen.packed, b"")
    save(folder / name / "good", PackedModel(frozen.model, frozen.packed, healthy.description()))
    return replace(healthy, file=(folder / name / "good").read_bytes())


def timeless(result: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in result.items() if "time" not in name}


# -- mutations: (rng, run, folder, value) -> what is broken, and the calls on it

Calls: TypeAlias = dict[str, tuple[Callable[[], Any], Any]]
"""name -> the call, and how it ends on what is healthy."""
NOTHING_RIGHT = object()
"""How a call ends that must not accept what is broken: never like this."""


def random_place(rng: np.random.Generator, tree: Any) -> tuple[str, int]:
    """The path of a random array of real numbers, and the number of one of its elements."""
    found = [(leaf_name(path), leaf.size) for path, leaf in jax.tree_util.tree_leaves_with_path(tree) if is_real(leaf)]
    path, size = found[int(rng.integers(len(found)))]
    return path, int(rng.integers(size))


def is_real(leaf: Any) -> bool:
    return jnp.issubdtype(leaf.dtype, jnp.floating) and leaf.size > 0


def put(tree: Any, path: str, element: int, value: float) -> Any:
    """The tree with a value in one place."""

    def changed(at, leaf):
        if leaf_name(at) != path:
            return leaf
        array = np.array(leaf)
        array.flat[element] = value
        return jnp.asarray(array)

    return jax.tree_util.tree_map_with_path(changed, tree)


def break_state(rng: np.random.Generator, run: Healthy, folder: Path, value: float) -> tuple[str, Calls]:
    number = int(rng.integers(1, EPOCHS * STEPS + 1))
    path, element = random_place(rng, run.run.train)
    change = partial(put, path=path, element=element, value=value)
    go_on = partial(train_changed, run, folder / "run", number, change, within=value != VALUES["1e30"])
    calls = {"step": (go_on, run.result)}
    broken = change(run.run.train)
    calls["save"] = (partial(save_broken, run, run.run.replace(train=broken), folder), NOTHING_RIGHT)
    if path.startswith(("params", "model_state")):
        variables = {"params": broken.params, **broken.model_state}
        calls["freeze"] = (partial(freeze, run.model, variables, run.dataset.image_shape), NOTHING_RIGHT)
        calls["verify"] = (partial(verified, run, variables, run.packed), NOTHING_RIGHT)
    return f"{path} after step {number}", calls


def train_changed(
    run: Healthy, folder: Path, number: int, change: Callable[[Any], Any], *, within: bool
) -> dict[str, Any]:
    """The result of the run when its state is changed after a step, or at the end of the call that makes it."""
    made = loop._Job

    def changing(train_steps, state, batches, hyper, first, count):
        part = number - steps_done(state)
        if not 0 < part <= count:
            return train_steps(state, batches, hyper, first, count)
        part = np.int32(part if within else count)
        state, metrics = train_steps(state, batches, hyper, first, part)
        state, rest = train_steps(change(state), batches, hyper, first + part, count - part)
        return state, jax.tree.map(jnp.add, metrics, rest)  # rows of steps that a call leaves out are 0

    def job(members, programs, *others):
        return made(members, programs._replace(train=partial(changing, programs.train)), *others)

    loop._Job = job
    try:
        return timeless(train(run.config, folder, data=run.dataset))
    finally:
        loop._Job = made


def save_broken(run: Healthy, broken: RunState, folder: Path) -> None:
    (folder / "saved").mkdir()
    (folder / "saved" / "metrics.jsonl").touch()
    save_run(run.config, folder / "saved", broken)


def verified(run: Healthy, variables: Any, packed: Any) -> bool:
    """Whether two networks are found to be the same."""
    images = normalize(jnp.asarray(run.dataset.test.images), mean=run.dataset.mean, std=run.dataset.std)
    return verify(run.model, variables, packed, [images]).passed


def break_checkpoint(rng: np.random.Generator, run: Healthy, folder: Path, value: float) -> tuple[str, Calls]:
    path, element = random_place(rng, run.run)
    workdir = Path(shutil.copytree(run.folder, folder / "run"))
    shutil.rmtree(workdir / "checkpoints")
    (workdir / "result.json").unlink()
    save_checkpoint(workdir / "checkpoints", EPOCHS * STEPS, put(run.run, path, element, value), metadata=run.metadata)
    return path, {
        "evaluate": (partial(evaluate_run, workdir), run.evaluated),
        "freeze": (partial(freeze_run, workdir), NOTHING_RIGHT),
        "resume": (lambda: timeless(train(run.config, workdir, data=run.dataset)), run.result),
    }


def break_packed(rng: np.random.Generator, run: Healthy, folder: Path, value: float) -> tuple[str, Calls]:
    path, element = random_place(rng, run.packed)
    packed = put(run.packed, path, element, value)
    variables = {"params": run.run.best.params, **run.run.best.model_state}
    header, tensors = opened(run.file)
    begin, end = header["numbers"]["data_offsets"]
    numbers = np.frombuffer(tensors[begin:end], np.float32).copy()
    numbers[int(rng.integers(len(numbers)))] = value
    (folder / "forged").write_bytes(checksummed(header, tensors[:begin] + numbers.tobytes() + tensors[end:]))
    return path, {
        "save": (partial(save, folder / "file", PackedModel(run.model, packed, run.description())), NOTHING_RIGHT),
        "verify": (partial(verified, run, variables, packed), NOTHING_RIGHT),
        "load": (partial(load, folder / "forged"), NOTHING_RIGHT),
    }


MUTATIONS = {"state": break_state, "checkpoint": break_checkpoint, "packed": break_packed}
SHARES = {"state": 0.6, "checkpoint": 0.2, "packed": 0.2}


def outcome(call: Callable[[], Any], healthy: Any) -> str:
    """What a call on something broken comes to."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            result = call()
        except (UsageError, RunError, ValueError) as error:
            return TOLD if tells(str(error)) else f"UNCLEAR {type(error).__name__}: {error}"
        except Exception as error:  # Whatever else is raised is what this script looks for.
            return f"TRACEBACK {type(error).__name__}: {error}"
    if any(tells(str(warning.message)) for warning in caught):
        return TOLD
    return HARMLESS if healthy is not NOTHING_RIGHT and result == healthy else f"SILENT: {str(result)[:100]}"


def tells(text: str) -> bool:
    """Whether it is one sentence that says of what kind the number is."""
    return "\n" not in text and any(kind in text for kind in KINDS)


def fuzz(runs: list[Healthy], folder: Path, *, mutations: int, seed: int, on_done: Callable[[str], None]) -> Counter:
    """(what is broken, value, call, outcome) -> how often."""
    rng, counts = np.random.default_rng(seed), Counter()
    for number in range(mutations):
        kind = str(rng.choice(list(MUTATIONS), p=list(SHARES.values())))
        name = str(rng.choice(list(VALUES)))
        run = runs[int(rng.integers(len(runs)))]
        place = folder / f"mutation-{number}"
        place.mkdir()
        what, calls = MUTATIONS[kind](rng, run, place, VALUES[name])
        for call, (function, healthy) in calls.items():
            found = outcome(function, healthy)
            counts[kind, call, found.partition(" ")[0] if found not in (TOLD, HARMLESS) else found] += 1
            if found not in (TOLD, HARMLESS):
                on_done(f"mutation {number}: {name} in {run.config.name}'s {what}, {call}: {found}")
        shutil.rmtree(place)
    return counts


def main() -> None:
    arguments = tyro.cli(Arguments, description=__doc__)
    use_compilation_cache()
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        runs = [healthy_run(name, Path(folder)) for name in arguments.runs]
        counts = fuzz(runs, Path(folder), mutations=arguments.mutations, seed=arguments.seed, on_done=print)
    for (kind, call, found), times in sorted(counts.items()):
        print(f"{times:6d}  {kind:10} {call:8}  {found}")
    bad = {word: sum(n for (*_, found), n in counts.items() if found.startswith(word)) for word in BAD}
    seconds = time.perf_counter() - began
    print(f"{arguments.mutations} mutations, {bad['SILENT']} silent passes, ", end="")
    print(f"{bad['TRACEBACK'] + bad['UNCLEAR']} tracebacks, {seconds:.0f} s")
    if any(bad.values()):
        raise RunError("numbers that mean nothing passed, or ended in tracebacks; see above")


if __name__ == "__main__":
    sys.exit(exit_code_of(main))
