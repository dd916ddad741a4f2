"""Runs on many devices, and in many processes, are the run on one device up to rounding.

A process has one CPU device in these tests; what needs eight is measured by this file, started as a script, at once.
"""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path

import flax.linen as nn
import jax
import numpy as np
import pytest
from jax.sharding import AbstractMesh

from bnn_jax.data import load_dataset
from bnn_jax.errors import UsageError
from bnn_jax.training.checkpoint import restore_checkpoint
from bnn_jax.training.config import Config, DataConfig, ModelConfig, OptimConfig, to_dict
from bnn_jax.training.devices import (
    check_batch_size,
    make_devices,
    place_batches,
    place_state,
    process_part,
    replicate,
    to_host,
)
from bnn_jax.training.epoch import Batches, train_steps
from bnn_jax.training.experiment import ImageInfo, hyper_parameters, make_experiment
from bnn_jax.training.loop import train
from bnn_jax.training.metrics import read_metrics
from bnn_jax.training.programs import initial_state, programs_of, state_shapes
from bnn_jax.training.step import init_state

pytestmark = pytest.mark.long  # together, for the measurement that all look at

ROOT = Path(__file__).parents[2]
EXAMPLES, BATCH, STEPS = 160, 16, 50
OPTIMIZERS = {"adam": OptimConfig("adam", 0.01), "sgd": OptimConfig("sgd", 0.1), "dfw": OptimConfig("dfw", 0.3)}
LINEAR_DFW = OptimConfig("dfw", 30.0)
MESHES = {"8": (8, 1), "2": (2, 1), "4x2": (8, 2)}
NETWORKS = ("adam 8", "dfw 8", "dfw 2", "dfw 4x2")
"""All pairs would take a minute to compile; sgd differs from adam in what each device computes by itself."""
SEEDS = range(3)
ALL_STEPS = (np.int32(0), np.int32(EXAMPLES // BATCH))
"""Number of the first batch of a call, and how many."""


def config_of(name: str, data: str) -> Config:
    settings = DataConfig(name=data, crop_padding=1, flip=True)
    epochs = STEPS * BATCH // EXAMPLES
    model = ModelConfig("resnet6", width=4)
    return Config("test", epochs, BATCH, model=model, data=settings, optim=OPTIMIZERS[name], scan_steps=1)


def write_data(path: Path) -> str:
    """Bands whose height tells the class, in noise; a third of the labels is drawn anew, so that the loss stays."""
    rng = np.random.default_rng(0)
    arrays = {}
    for name, count in (("train", EXAMPLES), ("validation", 44), ("test", 31)):
        labels = rng.integers(0, 4, count)
        images = rng.integers(0, 120, (count, 8, 8, 1))
        for image, label in zip(images, labels):
            image[2 * label : 2 * label + 2] += 100
        drawn = rng.integers(0, 4, count)
        arrays[f"{name}_images"] = images.astype(np.uint8)
        arrays[f"{name}_labels"] = np.where(rng.random(count) < 0.3, drawn, labels)
    np.savez(path, **arrays)
    return str(path)


class Linear(nn.Module):
    """Without a sign in it, it does not turn a rounding into another network."""

    @nn.compact
    def __call__(self, x, *, train, progress=None):
        kernel = self.param("latent_kernel", nn.initializers.normal(0.1), (64, 4))
        inputs = x.reshape(len(x), -1) / 8  # of length 1, so that logits, and their rounding, are small
        return inputs @ kernel, {}


SETTINGS = {"accumulate_steps": 2, "data": DataConfig(crop_padding=1, mixup_alpha=0.3, smallest_area=0.5)}


def train_linear(dataset, optim, devices, **settings):
    """(parameters, or their average, and gammas) after 50 steps."""
    info = ImageInfo((8, 8, 1), 4, tuple(dataset.mean), tuple(dataset.std))
    config = replace(config_of("dfw", "unused"), optim=optim, **settings)
    rate = {"learning_rate": optim.learning_rate}
    experiment = make_experiment(config, info, total_steps=STEPS, devices=devices, **rate)._replace(model=Linear())
    state = place_state(jax.jit(partial(init_state, experiment))(0), devices)
    order = np.arange(STEPS * BATCH).reshape(STEPS, BATCH) % EXAMPLES
    batches = Batches(*replicate((dataset.train.images, dataset.train.labels, order), devices))
    state, metrics = jax.jit(partial(train_steps, experiment))(state, batches)
    return to_host(state.evaluated[0]), np.asarray(metrics.get("gamma", 0.0))


def difference(first, second) -> float:
    """The largest between two trees of parameters, each leaf in units of its largest value."""
    pairs = zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True)
    return max(float(np.abs(a - b).max() / np.abs(a).max()) for a, b in pairs)


def train_network(config, dataset, programs, seed):
    """Parameters after 50 steps, in five calls of the program that `train` calls too, and what validation finds."""
    state = place_state(programs.init(np.uint32(seed)), programs.devices)
    data = replicate((dataset.train.images, dataset.train.labels), programs.devices)
    for epoch in range(1, config.epochs + 1):
        order = replicate(np.asarray(programs.epoch_permutation(state.seed, np.int32(epoch))), programs.devices)
        state, _ = programs.train(state, Batches(*data, order), hyper_parameters(config), *ALL_STEPS)
    assert int(state.step) == STEPS
    validation = replicate((dataset.validation.images, dataset.validation.labels), programs.devices)
    found = programs.evaluate(state.params, state.model_state, *validation)
    return to_host(state.params), jax.device_get(found)


def measure(folder: Path) -> dict:
    dataset = load_dataset(str(folder / "data.npz"))
    linear = {name: train_linear(dataset, optim, None) for name, optim in (OPTIMIZERS | {"dfw": LINEAR_DFW}).items()}
    found = {"linear": {}, "network": {}}
    references = {}
    for name in {case.split()[0] for case in NETWORKS}:
        config = config_of(name, str(folder / "data.npz"))
        programs = programs_of(config, dataset)
        references[name] = [train_network(config, dataset, programs, seed) for seed in SEEDS]
    for name in OPTIMIZERS:
        for mesh, (count, model_parallel) in MESHES.items():
            devices = make_devices(count, model_parallel=model_parallel)
            found["linear"][f"{name} {mesh}"] = compare_linear(linear[name], name, dataset, devices)
            if f"{name} {mesh}" in NETWORKS:
                found["network"][f"{name} {mesh}"] = compare_networks(references[name], name, dataset, folder, devices)
    averaged = replace(OPTIMIZERS["dfw"], ema_decay=0.9, latent_weight_decay=0.01)
    parted = [train_linear(dataset, averaged, devices, **SETTINGS)[0] for devices in (None, make_devices(8))]
    found["settings"] = difference(*parted)
    found["resumed"] = measure_resume(dataset, folder, references["dfw"][0][0])
    train(config_of("dfw", str(folder / "data.npz")), folder / "two", devices=make_devices(2))
    check_placement()
    return found


def compare_linear(one, name, dataset, devices) -> dict:
    params, gammas = train_linear(dataset, LINEAR_DFW if name == "dfw" else OPTIMIZERS[name], devices)
    return {
        "parameters": difference(one[0], params),
        "gamma": float(np.abs(one[1] - gammas).max()),
        "gammas_inside": float(((gammas > 0) & (gammas < 1)).mean()),
        "largest": float(np.abs(params["latent_kernel"]).max()),
    }


def compare_networks(ones, name, dataset, folder, devices) -> dict:
    config = config_of(name, str(folder / "data.npz"))
    programs = programs_of(config, dataset, devices=devices)
    runs = [train_network(config, dataset, programs, seed) for seed in SEEDS]
    compiled = programs.train._cache_size()
    state = place_state(programs.init(np.uint32(0)), devices)
    order = np.zeros((EXAMPLES // BATCH, BATCH), np.int32)
    batches = Batches(*replicate((dataset.train.images, dataset.train.labels, order), devices))
    text = programs.train.lower(state, batches, hyper_parameters(config), *ALL_STEPS).compile().as_text()
    convolutions = re.findall(r"f32\[(\d+),\d+,\d+,\d+\]\S* convolution\(.*/jvp\(ResNet\)", text)
    return {
        "parameters": [difference(one[0], run[0]) for one, run in zip(ones, runs)],
        "evaluation": [abs(float(one[1]["loss"] - run[1]["loss"])) for one, run in zip(ones, runs)],
        "compiled": compiled,
        "batches": [int(size) for size in convolutions],
        "all_reduces": len(re.findall(r" all-reduce(?:-start)?\(", text)),
    }


def measure_resume(dataset, folder: Path, reference) -> float:
    """Forty steps on one device and ten on eight, model parallel, against fifty on one."""

    class Stop(Exception):
        pass

    def stop(done, total, text):
        if done == 41:
            raise Stop

    config = config_of("dfw", str(folder / "data.npz"))
    with suppress(Stop):
        train(config, folder / "moved", data=dataset, on_progress=stop)
    devices = make_devices(model_parallel=2)
    saved = restore_checkpoint(folder / "moved" / "checkpoints", state_shapes(programs_of(config, dataset)))
    assert saved.step == 40
    placed = place_state(saved.state, devices)
    for a, b in zip(jax.tree.leaves(saved.state), jax.tree.leaves(to_host(placed)), strict=True):
        assert np.asarray(a).tobytes() == b.tobytes()
    kernel = placed.train.params["stage1_block1"]["conv1"]["latent_kernel"]
    assert {shard.data.shape for shard in kernel.addressable_shards} == {(3, 3, 4, 2)}
    train(config, folder / "moved", data=dataset, devices=devices)
    moved = restore_checkpoint(folder / "moved" / "checkpoints", state_shapes(programs_of(config, dataset)))
    assert moved.step == STEPS
    return difference(reference, moved.state.train.params)


def check_placement() -> None:
    devices = make_devices(4, model_parallel=2)
    assert process_part(devices) == process_part(None) == (0, 1)
    block = np.arange(3 * 8 * 5).reshape(3, 8, 5)
    placed = place_batches(block, devices)
    np.testing.assert_array_equal(placed, block)
    assert {shard.data.shape for shard in placed.addressable_shards} == {(3, 4, 5)}
    assert make_devices(1) is None
    with pytest.raises(
        UsageError, match=r"`model_parallel` \(=3\) must divide the number of devices, 8; .*: 1, 2, 4, 8"
    ):
        make_devices(model_parallel=3)


@pytest.fixture(scope="module")
def measured(tmp_path_factory, subprocess_env):
    folder = tmp_path_factory.mktemp("devices")
    write_data(folder / "data.npz")
    env = subprocess_env | {"XLA_FLAGS": f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=8"}
    command = [sys.executable, __file__, str(folder)]
    done = subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(done.stdout), folder


@pytest.mark.full
@pytest.mark.parametrize("mesh", MESHES)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_fifty_steps_on_many_devices_are_fifty_steps_on_one(measured, name, mesh):
    found = measured[0]["linear"][f"{name} {mesh}"]
    assert found["parameters"] < 1e-5
    assert found["gamma"] < 1e-6
    if name == "dfw":
        assert found["gammas_inside"] > 0.5
        assert found["largest"] == 1.0


@pytest.mark.full
@pytest.mark.parametrize("case", NETWORKS)
def test_fifty_steps_of_a_binary_network_too(measured, case):
    """The median of three seeds: now and then a sign's argument is within rounding of zero, and the two runs part."""
    found = measured[0]["network"][case]
    assert np.median(found["parameters"]) < 1e-5
    assert np.median(found["evaluation"]) < 1e-5


@pytest.mark.full
@pytest.mark.parametrize("case", NETWORKS)
def test_each_device_computes_its_part_in_one_program(measured, case):
    found = measured[0]["network"][case]
    count, model_parallel = MESHES[case.split()[1]]
    assert len(found["batches"]) == 5
    assert set(found["batches"]) == {BATCH * model_parallel // count}
    assert found["compiled"] == 1
    # Two for each of the five batch norms, two in branches that it does not take, and one for the gradients; with
    # "model" those of the layers' inputs as well.
    assert found["all_reduces"] <= (22 if model_parallel == 1 else 40)


@pytest.mark.full
def test_so_are_those_on_mixed_images_in_parts_and_their_average(measured):
    assert measured[0]["settings"] < 1e-5


@pytest.mark.full
def test_a_run_goes_on_with_other_devices(measured):
    assert measured[0]["resumed"] < 1e-5


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def start_pair(workdir: Path, env) -> list[subprocess.Popen]:
    """Two processes of one run; the second has a workdir that must stay empty."""
    command = [sys.executable, "scripts/train.py", "--distributed", "--num-processes", "2"]
    command += ["--coordinator-address", f"127.0.0.1:{free_port()}", "--config", str(workdir.parent / "config.py")]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    each = [["--process-id", str(n), "--workdir", str(workdir if n == 0 else workdir.parent / "none")] for n in (0, 1)]
    return [subprocess.Popen([*command, *own], cwd=ROOT, env=env, **pipes) for own in each]


def outputs(pair, code=0) -> list[str]:
    texts = [process.communicate(timeout=300)[0] for process in pair]
    assert [process.returncode for process in pair] == [code, code], "\n".join(texts)
    assert "Traceback" not in "".join(texts)
    return texts


@pytest.mark.full
def test_two_processes_stop_together_resume_and_make_the_run_of_one(measured, tmp_path, subprocess_env):
    """SIGTERM for one of them; both save at one step, and go on to the parameters of one process with two devices."""
    folder = measured[1]
    config = config_of("dfw", str(folder / "data.npz"))
    source = f"from bnn_jax.training.config import from_dict\nget_config = lambda: from_dict({to_dict(config)!r})\n"
    (tmp_path / "config.py").write_text(source)
    log = tmp_path / "run" / "metrics.jsonl"
    pair = start_pair(tmp_path / "run", subprocess_env)
    deadline = time.monotonic() + 300
    while not (log.exists() and log.stat().st_size):
        assert all(process.poll() is None for process in pair), outputs(pair)
        assert time.monotonic() < deadline
        time.sleep(0.01)
    pair[1].send_signal(signal.SIGTERM)
    steps = [re.search(r"preempted: saved at step (\d+)", text)[1] for text in outputs(pair)]
    assert steps[0] == steps[1]
    assert 0 < int(steps[0]) < STEPS
    first, second = outputs(start_pair(tmp_path / "run", subprocess_env))
    assert "test accuracy" in first
    assert "test accuracy" not in second
    assert not (tmp_path / "none").exists()
    like = initial_state(programs_of(config, load_dataset(config.data.name)), 0)
    two, one = (restore_checkpoint(path / "checkpoints", like) for path in (tmp_path / "run", folder / "two"))
    assert two.step == one.step == STEPS
    assert difference(two.state.train.params, one.state.train.params) < 1e-5
    logs = [read_metrics(path / "metrics.jsonl") for path in (tmp_path / "run", folder / "two")]
    losses = [[record["loss"] for record in log if record["kind"] == "train"] for log in logs]
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-5)


def test_devices_that_are_not_there_are_refused():
    with pytest.raises(UsageError, match=r"`devices` \(=2\) must be from 1 to 1, what this machine has"):
        make_devices(2)
    with pytest.raises(
        UsageError, match=r"`model_parallel` \(=2\) must divide the number of devices, 1; choose one of: 1"
    ):
        make_devices(model_parallel=2)
    assert make_devices() is None


def test_a_batch_that_cannot_be_divided_is_refused():
    devices = AbstractMesh((8, 1), ("data", "model"))
    check_batch_size(16, devices)
    check_batch_size(7, None)
    with pytest.raises(
        UsageError, match=r"`batch_size` \(=20\) must be a multiple of 8, .* share a batch; choose 16 or 24, or fewer"
    ):
        check_batch_size(20, devices)
    with pytest.raises(UsageError, match=r"`batch_size` \(=5\) .*; choose 8, or fewer `--devices`"):
        check_batch_size(5, devices)
    check_batch_size(32, devices, parts=2)
    with pytest.raises(
        UsageError, match=r"multiple of 16, .* times `accumulate_steps` \(=2\); choose 16 or 32, or fewer"
    ):
        check_batch_size(24, devices, parts=2)


if __name__ == "__main__":
    jax.config.update("jax_numpy_rank_promotion", "raise")
    print(json.dumps(measure(Path(sys.argv[1]))))
