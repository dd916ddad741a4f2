"""Two processes save a state of which each holds a half; this file, started as a script, is one of them."""

import json
import socket
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from checkpoint_states import bits_of

from bnn_jax.training.checkpoint import checkpoint_steps, restore_checkpoint
from bnn_jax.training.devices import initialize_processes, make_devices, place_state
from bnn_jax.training.sharded_checkpoint import is_in_parts, save_in_parts, sees_folder_of_first


def state_of(step: int) -> dict:
    rng = np.random.default_rng(step)
    return {
        "kernel": rng.normal(size=(3, 3, 4, 6)).astype(np.float32),
        "layers": [rng.integers(0, 2**32, (5, 8), dtype=np.uint32), rng.normal(size=7).astype(np.float32)],
        "step": np.int32(step),
    }


def save_as_one_of_two(address: str, number: int, folder: Path) -> None:
    initialize_processes(address, 2, number)
    devices = make_devices(model_parallel=2)
    seen = [sees_folder_of_first(folder), sees_folder_of_first(folder / "own" if number == 0 else folder / "none")]
    for step in (1, 2, 3):
        state = place_state(state_of(step), devices)
        save_in_parts(folder / "checkpoints", step, state, metadata={"saved_at": step})
    print(json.dumps([seen, [is_in_parts(leaf) for leaf in jax.tree.leaves(state)]]))


@pytest.mark.full
def test_each_of_two_processes_saves_the_parts_that_it_holds(tmp_path, subprocess_env):
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{listener.getsockname()[1]}"
    (tmp_path / "own").mkdir()
    env = subprocess_env | {"PYTHONPATH": f"{Path(__file__).parents[1]}:{subprocess_env.get('PYTHONPATH', '')}"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "env": env}
    pair = [subprocess.Popen([sys.executable, __file__, address, str(n), str(tmp_path)], **pipes) for n in (0, 1)]
    texts = [process.communicate(timeout=300) for process in pair]
    assert [process.returncode for process in pair] == [0, 0], texts
    assert [json.loads(out.splitlines()[-1]) for out, _ in texts] == [[[True, False], [True, True, False, False]]] * 2
    assert checkpoint_steps(tmp_path / "checkpoints") == [2, 3]
    assert all((tmp_path / "checkpoints" / "3" / "state" / f"ocdbt.process_{n}").is_dir() for n in (0, 1))
    restored = restore_checkpoint(tmp_path / "checkpoints", state_of(0))
    assert (restored.step, restored.metadata) == (3, {"saved_at": 3})
    assert bits_of(restored.state) == bits_of(state_of(3))


if __name__ == "__main__":
    save_as_one_of_two(sys.argv[1], int(sys.argv[2]), Path(sys.argv[3]))
