r"""The devices of a run as one mesh, and its processes, of which the first alone reads and writes the run's folder.

The mesh has two axes.  Over "data" go the examples of each batch; over "model", if it is longer than 1, the output
features of parameters and of whatever has their shape.  XLA divides the programs accordingly and inserts what must be
summed over devices: batch statistics, gradients, the losses and Deep Frank-Wolfe's step size are those of the whole
batch.  Where there is one device there is no mesh: `devices` is None, and nothing is placed.
"""

import math
import os
import pickle
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.errors import JaxRuntimeError
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array

from bnn_jax.errors import RunError, UsageError

T = TypeVar("T")

SECONDS_TO_GATHER = 30
"""What a process that has failed waits for the others before it ends them."""


def initialize_processes(
    coordinator_address: str | None = None, num_processes: int | None = None, process_id: int | None = None
) -> None:
    """Join the processes of a run, before JAX is used for anything else.

    On a TPU pod, under Slurm and under Open MPI all arguments may be left out; JAX finds them in the environment.

    Args:
      coordinator_address: HOST:PORT at which process 0 can be reached by all.
      num_processes: how many there are.
      process_id: number of this one, from 0.

    Raises:
      UsageError: if they are neither given nor found.
      RunError: if the processes do not find each other within five minutes.
    """
    # It would swallow a SIGTERM that comes before the run handles them.
    jax.config.update("jax_enable_preemption_service", False)
    try:
        jax.distributed.initialize(
            coordinator_address, num_processes, process_id, shutdown_timeout_seconds=SECONDS_TO_GATHER
        )
    except (ValueError, TypeError, IndexError) as error:
        raise UsageError(
            f"`--distributed` cannot tell which processes there are ({str(error).rstrip('.')}); start it under Slurm, "
            "Open MPI or on a TPU pod, or give `--coordinator-address` HOST:PORT, `--num-processes` and `--process-id`"
        ) from None
    except JaxRuntimeError as error:
        raise RunError(f"the processes did not find each other: {_first_line(error)}; check address and port") from None


def make_devices(count: int | None = None, *, model_parallel: int = 1) -> Mesh | None:
    """Make the mesh ("data", "model") of the first `count` devices, all by default; None for a single one.

    Args:
      count: of devices; with several processes it must be left out.
      model_parallel: length of the axis "model".

    Raises:
      UsageError: if there are not that many, or `model_parallel` does not divide them.
    """
    # In the order of processes, so that each holds neighbouring examples of a batch; jax.make_mesh may mix them.
    devices = sorted(jax.devices(), key=lambda device: (device.process_index, device.id))
    if count is not None and jax.process_count() > 1:
        raise UsageError(f"`devices` (={count}) must be left out with several processes; all {len(devices)} are used")
    if count is not None and not 1 <= count <= len(devices):
        raise UsageError(f"`devices` (={count}) must be from 1 to {len(devices)}, what this machine has")
    devices = devices[:count]
    if model_parallel < 1 or len(devices) % model_parallel:
        divisors = [str(n) for n in range(1, len(devices) + 1) if len(devices) % n == 0]
        raise UsageError(
            f"`model_parallel` (={model_parallel}) must divide the number of devices, {len(devices)}; "
            f"choose one of: {', '.join(divisors)}"
        )
    if len(devices) == 1:
        return None
    grid = np.array(devices).reshape(-1, model_parallel)
    return Mesh(grid, ("data", "model"), axis_types=(AxisType.Auto,) * 2)


def data_shards(devices: Mesh | None) -> int:
    """Count the parts into which a batch is divided."""
    return 1 if devices is None else devices.shape["data"]


def check_batch_size(batch_size: int, devices: Mesh | None, *, parts: int = 1) -> None:
    """Raise UsageError unless every device gets as many examples of each of a batch's `parts` as any other."""
    shards = data_shards(devices) * parts
    if batch_size % shards:
        accumulated = f" times `accumulate_steps` (={parts})" if parts > 1 else ""
        below = batch_size // shards * shards
        near = [str(size) for size in (below, below + shards) if size]
        raise UsageError(
            f"`batch_size` (={batch_size}) must be a multiple of {shards}, the devices that share a batch"
            f"{accumulated}; choose {' or '.join(near)}, or fewer `--devices`"
        )


def replicated(devices: Mesh) -> NamedSharding:
    """Return the sharding that puts the whole array on every device."""
    return NamedSharding(devices, PartitionSpec())


def state_sharding(leaf: Any, devices: Mesh) -> NamedSharding:
    """Choose how an array of a run's state is sharded, by its shape.

    The last axis goes over "model" if the array has two or more and its length is a multiple; else it is replicated.
    """
    parts = devices.shape["model"]
    if parts == 1 or leaf.ndim < 2 or leaf.shape[-1] % parts:
        return replicated(devices)
    return NamedSharding(devices, PartitionSpec(*[None] * (leaf.ndim - 1), "model"))


def _place(array: Any, sharding: NamedSharding) -> Array:
    host = np.asarray(array)
    # Not jax.device_put, which sends every value around to see that all processes have the same.
    return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])


def replicate(tree: Any, devices: Mesh | None) -> Any:
    """Copy arrays that each process has whole to every device."""
    if devices is None:
        return jax.tree.map(jnp.asarray, tree)
    return jax.tree.map(lambda leaf: _place(leaf, replicated(devices)), tree)


def place_state(state: Any, devices: Mesh | None) -> Any:
    """Shard a state that each process has whole as :func:`state_sharding` says; on one device leave it as it is."""
    if devices is None:
        return state
    return jax.tree.map(lambda leaf: _place(leaf, state_sharding(np.asarray(leaf), devices)), state)


def place_batches(block: Any, devices: Mesh | None) -> Any:
    """Put batches on the devices, each process the part of each batch that :func:`process_part` says.

    Args:
      block: tree of arrays [steps, examples of this process, ...].

    Returns:
      Arrays [steps, batch, ...], their second axis over "data".
    """
    if devices is None:
        return jax.tree.map(jnp.asarray, block)
    sharding = NamedSharding(devices, PartitionSpec(None, "data"))
    return jax.tree.map(lambda part: jax.make_array_from_process_local_data(sharding, np.asarray(part)), block)


def place_batch(batch: Any, devices: Mesh | None) -> Any:
    """Put one batch on the devices: arrays [examples of this process, ...] become [batch, ...]."""
    if devices is None:
        return jax.tree.map(jnp.asarray, batch)
    sharding = NamedSharding(devices, PartitionSpec("data"))
    return jax.tree.map(lambda part: jax.make_array_from_process_local_data(sharding, np.asarray(part)), batch)


def process_part(devices: Mesh | None) -> tuple[int, int]:
    """Return (index, count): this process reads the index-th of `count` equal parts of each batch, in its order.

    Several processes have the same index where the axis "model" goes over them.
    """
    if devices is None:
        return 0, 1
    owners = np.vectorize(lambda device: device.process_index)(devices.devices)
    rows = np.flatnonzero((owners == jax.process_index()).any(axis=1))
    return int(rows[0]) // len(rows), len(owners) // len(rows)


def shard_batch(x: Array, devices: Mesh | None) -> Array:
    """Divide the first axis over "data", inside jit."""
    if devices is None:
        return x
    return jax.lax.with_sharding_constraint(x, NamedSharding(devices, PartitionSpec("data")))


def keep_sharding(state: Any, devices: Mesh | None) -> Any:
    """Shard a state inside jit as :func:`state_sharding` says, so that the same program takes it again."""
    if devices is None:
        return state
    return jax.tree.map(lambda leaf: jax.lax.with_sharding_constraint(leaf, state_sharding(leaf, devices)), state)


def to_host(tree: Any) -> Any:
    """Gather the arrays whole, in numpy.  All processes call this together."""

    def gather(leaf):
        whole = leaf.is_fully_addressable or leaf.is_fully_replicated
        return np.asarray(leaf) if whole else multihost_utils.process_allgather(leaf, tiled=True)

    return jax.tree.map(gather, tree)


def is_first_process() -> bool:
    """Tell whether this process is the one that reads, writes and prints."""
    return jax.process_index() == 0


def on_first_process(work: Callable[[], T]) -> T:
    """Run `work` on process 0 alone, and return or raise on every process what it returns or raises there.

    All processes call this together, so that each waits until the work is done.  Results have to be picklable.

    Raises:
      RunError: on the other processes, for what process 0 raises and cannot be told.
    """
    if jax.process_count() == 1:
        return work()
    if not is_first_process():
        value, error = pickle.loads(_broadcast(b""))
        if error is not None:
            raise error
        return value
    try:
        value = work()
    except Exception as error:
        told = error if type(error) in (UsageError, RunError) else RunError(f"process 0 has failed: {error!r}")
        _broadcast(pickle.dumps((None, told)))
        raise
    _broadcast(pickle.dumps((value, None)))
    return value


def _broadcast(message: bytes) -> bytes:
    """Send the message of process 0 to all."""
    length = int(multihost_utils.broadcast_one_to_all(np.uint32(len(message))))
    words = np.zeros(1024 * math.ceil(length / 4096), np.uint32)  # few lengths, few programs
    words.view(np.uint8)[: len(message)] = np.frombuffer(message, np.uint8)
    return multihost_utils.broadcast_one_to_all(words).tobytes()[:length]


def largest(value: float) -> float:
    """Return the largest value of all processes, in float32 if there are several; all call this together."""
    if jax.process_count() == 1:
        return value
    return float(multihost_utils.process_allgather(np.float32(value)).max())


@contextmanager
def ended_with_the_others() -> Iterator[None]:
    """End this process, with exit code 1, when it cannot go on because another one has gone.

    The way out through Python would wait for the others once more, and abort.
    """
    try:
        yield
    except JaxRuntimeError as error:
        if jax.process_count() == 1:
            raise
        told = f"error: the processes cannot go on together ({_first_line(error)}); start all of them again to resume"
        print(told, file=sys.stderr, flush=True)
        os._exit(1)


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0].rstrip(".")
