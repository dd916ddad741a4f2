"""Break short runs in every way that happens, and let them recover: python tests/fuzz/fuzz_runs.py --faults 100

Each run is killed, preempted or out of disk, what it left behind is damaged, and the same command is given again,
several times over.  In the end it must have the parameters, the log and the result of a run that nothing happened to,
bit for bit.  No process may print a traceback, preemption must end one with exit code 0 within ten seconds, and a full
disk with 1 and one sentence.  Ends with exit code 1 if anything else happens.

Needs Linux.  A disk is really full where this user may mount a small tmpfs; elsewhere the limit on the size of files
stands for it alone.
"""

import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import tyro

sys.path.insert(0, str(Path(__file__).parents[1]))
from damage import flip_one_bit, truncate
from suffering_run import Failure, Run, listens, reach_a_moment, wait

from bnn_jax.data import load_dataset
from bnn_jax.errors import RunError, exit_code_of
from bnn_jax.training.checkpoint import checkpoint_steps, verify_checkpoint
from bnn_jax.training.metrics import read_metrics

SCRIPT = Path(__file__).parents[2] / "scripts" / "train.py"
# A dozen epochs of 33 steps, eleven calls of one compiled program each.
OPTIONS = "--epochs 12 --scan-steps 3 --model.width 4 --checkpoint-every-epochs 1"
SECONDS_TO_END = 10.0
DISK_BYTES = 4_000_000
DATA_FILES = "checkpoints/[0-9]*/**/*"


@dataclass(frozen=True)
class Arguments:
    faults: int = 100
    seed: int = 0
    at_once: int = 2
    """Runs at the same time."""
    keep: Path | None = None
    """Folder for the runs, which are then kept; a new one."""


# -- faults of a process: each returns False if the run was finished before


def kill(run: Run) -> bool:
    process = run.start()
    hit = reach_a_moment(run, process)
    process.kill()
    return wait(run, process).returncode == -signal.SIGKILL and hit


def preempt(run: Run) -> bool:
    process = run.start()
    while not listens(process) and process.poll() is None:
        time.sleep(0.005)
    hit = reach_a_moment(run, process) and listens(process)
    asked = time.monotonic()
    if hit:
        process.terminate()
    ended = wait(run, process)
    seconds = time.monotonic() - asked
    if hit and (ended.returncode != 0 or seconds > SECONDS_TO_END):
        raise Failure("not preempted", f"{seconds:.1f} s, exit code {ended.returncode}: {ended.stdout}")
    run.seconds_to_end = max(run.seconds_to_end, seconds if hit else 0.0)
    return hit


def limit_file_size(run: Run) -> bool:
    process = run.start()
    most = int(10 ** run.chance.uniform(0, 4.8))
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (most, most))
    return out_of_space(run, process, "File too large")


def fill_disk(run: Run) -> bool:
    ballast, left = run.workdir.parent / "ballast", int(10 ** run.chance.uniform(2, 5.6))
    space = os.statvfs(run.workdir.parent)
    ballast.write_bytes(bytes(max(space.f_bavail * space.f_frsize - left, 0)))
    try:
        return out_of_space(run, run.start(), "No space left on device")
    finally:
        ballast.unlink()


def out_of_space(run: Run, process: subprocess.Popen, reason: str) -> bool:
    ended = wait(run, process)
    errors = [line for line in ended.stdout.splitlines() if line.startswith("error: ")]
    if ended.returncode != 0 and not (ended.returncode == 1 and len(errors) == 1 and reason in errors[0]):
        raise Failure("not one sentence", f"exit code {ended.returncode}: {ended.stdout}")
    return ended.returncode == 1


# -- faults of what lies on the disk: (run) -> what was done


def flip_bit(run: Run) -> str:
    path = some_file(run, least=1)
    path.write_bytes(flip_one_bit(run.bits(), path.read_bytes()))
    return str(path.relative_to(run.workdir))


def cut(run: Run) -> str:
    path = some_file(run, least=1)
    data = path.read_bytes()
    path.write_bytes(run.chance.choice([b"", truncate(run.bits(), data)]))
    return f"{path.relative_to(run.workdir)} after {path.stat().st_size} bytes"


def delete_file(run: Run) -> str:
    path = some_file(run)
    path.unlink()
    return str(path.relative_to(run.workdir))


def delete_checkpoint(run: Run) -> str:
    path = run.chance.choice(run.saved()).with_suffix("")
    shutil.rmtree(path, ignore_errors=True)
    return path.name


def add_empty_folder(run: Run) -> str:
    path = new_name(run, map(str, range(0, 660, 33)))
    path.mkdir()
    return path.name


def add_unrelated_file(run: Run) -> str:
    path = new_name(run, ["notes.txt", "330", "330.json", "331", "331.json", "331.json.tmp", "tmp"])
    path.write_text("mine")
    return path.name


def add_rejected_checkpoint(run: Run) -> str:
    """As a whole, or as another program would leave it, without our manifest."""
    folder, other = run.workdir / "checkpoints", run.workdir.parents[1] / "other" / "checkpoints"
    step, whole = run.chance.choice(checkpoint_steps(other)), run.chance.random() < 0.5
    shutil.copytree(other / str(step), folder / str(step), dirs_exist_ok=True)
    if whole:
        shutil.copy(other / f"{step}.json", folder)
    return f"{step}{'' if whole else ' without manifest'}"


def new_name(run: Run, names: Iterable[str]) -> Path:
    paths = [run.workdir / "checkpoints" / name for name in names]
    return run.chance.choice([path for path in paths if not path.exists()])


def some_file(run: Run, least: int = 0) -> Path:
    """A file of the run: one of the small ones, a manifest or a part of the data, equally often."""
    groups = [run.workdir.glob("*"), iter(run.saved()), run.workdir.glob(DATA_FILES)]
    found = [sorted(path for path in group if path.is_file() and path.stat().st_size >= least) for group in groups]
    return run.chance.choice(run.chance.choice([group for group in found if group]))


PROCESS_FAULTS: dict[str, Callable[[Run], bool]] = {
    "kill -9": kill,
    "SIGTERM": preempt,
    "file-size limit": limit_file_size,
    "no space left": fill_disk,
}
DISK_FAULTS: dict[str, Callable[[Run], str]] = {
    "flipped bit": flip_bit,
    "truncation": cut,
    "deleted file": delete_file,
    "deleted checkpoint": delete_checkpoint,
    "empty folder": add_empty_folder,
    "unrelated file": add_unrelated_file,
    "rejected checkpoint": add_rejected_checkpoint,
}


def suffer(run: Run, kind: str) -> bool:
    """A fault; False if the process was finished before it could be hit."""
    if kind in PROCESS_FAULTS:
        run.suffered.append(kind)
        hit = PROCESS_FAULTS[kind](run)
        if not hit:
            run.suffered.pop()
        return hit
    while not run.saved():
        process = run.start()
        while not run.saved() and process.poll() is None:
            time.sleep(0.01)
        process.kill()
        if wait(run, process).returncode not in (0, -signal.SIGKILL):
            raise Failure("not recovered", "before anything was saved")
    run.suffered.append(kind)
    run.suffered[-1] = f"{kind}: {DISK_FAULTS[kind](run)}"
    return True


def live(run: Run, kinds: list[str]) -> None:
    """Suffer all faults but the last, finish, suffer that one, which undoes the end, and finish again."""
    for kind in kinds[:-1]:
        if not suffer(run, kind):
            break
    run.finish()
    compare(run)
    suffer(run, kinds[-1])
    (run.workdir / "result.json").unlink(missing_ok=True)
    run.finish()
    compare(run)


def compare(run: Run) -> None:
    """Raise Failure unless the run has config, log, result and last checkpoint of the one that nothing happened to."""
    try:
        ours, theirs = outcome(run.workdir), outcome(run.workdir.parents[1] / "whole")
    except (RunError, OSError, LookupError, ValueError) as error:
        raise Failure("wrong result", repr(error)) from None
    for name, value in theirs.items():
        if ours[name] != value:
            raise Failure("wrong result", name)


def outcome(workdir: Path) -> dict[str, object]:
    def timeless(record):
        return {name: value for name, value in record.items() if name not in ("step_time_ms", "sha256")}

    step = checkpoint_steps(workdir / "checkpoints")[-1]
    verify_checkpoint(workdir / "checkpoints", step)
    return {
        "config": json.loads((workdir / "config.json").read_text()),
        "result": timeless(json.loads((workdir / "result.json").read_text())),
        "log": [timeless(record) for record in read_metrics(workdir / "metrics.jsonl")],
        "step": step,
        "parameters": json.loads((workdir / "checkpoints" / f"{step}.json").read_text())["leaves"],
    }


@contextmanager
def small_disk(folder: Path) -> Iterator[bool]:
    """Mount a tmpfs on the new `folder`, if that is allowed; tells whether it is."""
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={DISK_BYTES}", "tmpfs", str(folder)]
    mounted = shutil.which("mount") is not None and subprocess.run(mount, capture_output=True).returncode == 0
    try:
        yield mounted
    finally:
        if mounted:
            subprocess.run(["umount", str(folder)], check=True)


def prepare(folder: Path) -> tuple[list[str], dict[str, str]]:
    """The digits as a file, the run that nothing happens to and another one; the command and its environment."""
    digits = load_dataset("digits")
    arrays = {
        f"{split}_{kind}": getattr(getattr(digits, split), kind)
        for split in ("train", "validation", "test")
        for kind in ("images", "labels")
    }
    np.savez(folder / "digits.npz", **arrays)
    command = [sys.executable, str(SCRIPT), "--config", str(SCRIPT.parents[1] / "configs" / "digits_xnor.py")]
    command += [*OPTIONS.split(), "--data.name", str(folder / "digits.npz")]
    env = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "JAX_COMPILATION_CACHE_DIR": str(folder / "cache"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        # Python 3.11 keeps what it could write of a .pyc file when the disk is full.
        "PYTHONDONTWRITEBYTECODE": "1",
    }
    for name, seed in (("whole", "0"), ("other", "1")):
        done = subprocess.run([*command, "--seed", seed, "--workdir", str(folder / name)], env=env, capture_output=True)
        if done.returncode != 0:
            raise RunError(f"a run that nothing happened to failed: {done.stderr.decode()}")
    return command, env


def attempt(run: Run, kinds: list[str]) -> Run:
    with small_disk(run.workdir.parent):
        try:
            live(run, kinds)
        except Failure as failure:
            run.title, run.seen = failure.args
    return run


def fuzz(folder: Path, faults: int, seed: int, at_once: int) -> list[Run]:
    """The fates of as many runs as it takes to suffer `faults`, five a run, of a process and of the disk in turn.

    Fewer if a round of runs fails before it suffers any.
    """

    def dealt(kinds):
        while True:
            yield from chance.sample(kinds, len(kinds))

    chance = random.Random(seed)
    command, env = prepare(folder)
    with small_disk(folder / "trial") as own_disk:
        process_kinds = dealt([kind for kind in PROCESS_FAULTS if own_disk or kind != "no space left"])
    disk_kinds = dealt(list(DISK_FAULTS))
    runs: list[Run] = []
    with ThreadPoolExecutor(at_once) as executor:
        while (missing := faults - sum(len(run.suffered) for run in runs)) > 0:
            begun = []
            for done in range(0, missing, 5):
                kinds = [kind for pair in islice(zip(process_kinds, disk_kinds), 2) for kind in pair]
                kinds = [*kinds[: min(5, missing - done) - 1], next(disk_kinds)]
                workdir = folder / f"run{len(runs) + len(begun)}" / "run"
                run = Run(workdir, command, env, random.Random(chance.random()))
                begun.append(executor.submit(attempt, run, kinds))
            runs += [run.result() for run in begun]
            if not any(run.result().suffered for run in begun):
                break  # they failed before anything could happen to them, and more runs would too
    return runs


def report(runs: list[Run]) -> None:
    kinds_of = lambda run: [fault.split(":")[0] for fault in run.suffered]
    suffered = Counter(kind for run in runs for kind in kinds_of(run))
    recovered = Counter(kind for run in runs for kind in kinds_of(run) if run.title == "recovered")
    for kind in (*PROCESS_FAULTS, *DISK_FAULTS):
        print(f"{kind:20s} {suffered[kind]:4d} faults, {recovered[kind]:4d} recoveries")
    print(f"{'':20s} {suffered.total():4d} faults, {recovered.total():4d} recoveries, in {len(runs)} runs")
    print(f"longest end after SIGTERM: {max(run.seconds_to_end for run in runs):.1f} s")
    titles = Counter(run.title for run in runs)
    print(f"{titles['wrong result']} wrong results, {titles['traceback']} tracebacks")
    for number, run in enumerate(runs):
        if run.title != "recovered":
            print(f"run {number}: {run.title} after {'; '.join(run.suffered)}\n{run.seen}")


def main() -> None:
    arguments = tyro.cli(Arguments, description=__doc__)
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as temporary:
        folder = (arguments.keep or Path(temporary, "fuzz")).absolute()
        folder.mkdir(parents=True)
        runs = fuzz(folder, arguments.faults, arguments.seed, arguments.at_once)
    report(runs)
    print(f"{time.perf_counter() - began:.0f} s")
    failed = sum(run.title != "recovered" for run in runs)
    if failed:
        raise RunError(f"{failed} of {len(runs)} runs did not recover")


if __name__ == "__main__":
    sys.exit(exit_code_of(main))
