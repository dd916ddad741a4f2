"""Train one network: bnn-jax train --config digits_xnor --workdir runs/mine --optimizer dfw

Started again with the same arguments it resumes from the newest good checkpoint, on as many devices as there are then.
On machines that work together it is started once on each (docs/tpu.md).
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from bnn_jax.cli.options import TrainingOptions, refuse_unread
from bnn_jax.compilation import use_compilation_cache
from bnn_jax.names import last_part
from bnn_jax.run import train
from bnn_jax.training.callbacks import LOGS
from bnn_jax.training.devices import initialize_processes, is_first_process, make_devices
from bnn_jax.training.overrides import parse


@dataclass(frozen=True, kw_only=True)
class Arguments(TrainingOptions):
    optimizer: str | None = None
    """Start from the settings that the config keeps for this optimizer."""
    overwrite: bool = False
    """Start anew where a run has begun: when the new one is ready to start, the old one is moved to
    WORKDIR.replaced-1."""
    extend: bool = False
    """Go on for more --epochs also where a schedule spans the whole run, along its curve over the longer one."""
    log: tuple[Literal["csv", "tensorboard", "wandb"], ...] = ()
    """Where the numbers go besides metrics.jsonl: a table with a line an epoch, event files, Weights & Biases."""
    model_parallel: int = 1
    """Devices among which the output features of parameters are divided."""
    distributed: bool = False
    """One of several processes, which the environment (TPU pod, Slurm, Open MPI) or the next three options name."""
    coordinator_address: str | None = None
    """HOST:PORT of process 0."""
    num_processes: int | None = None
    """How many processes there are."""
    process_id: int | None = None
    """Number of this process, from 0."""


PROCESSES = ("coordinator_address", "num_processes", "process_id")


def main() -> None:
    arguments = parse(Arguments, __doc__)
    config = arguments.settings
    workdir = arguments.workdir or Path("runs") / f"{config.name}_{last_part(config.optim.name)}_seed{config.seed}"
    use_compilation_cache()
    if arguments.distributed:
        initialize_processes(arguments.coordinator_address, arguments.num_processes, arguments.process_id)
    else:
        refuse_unread(arguments, PROCESSES, "is for one of several processes, with `--distributed`")
    reading = arguments.reading()
    starting = {"overwrite": arguments.overwrite, "extend": arguments.extend}
    starting["callbacks"] = [LOGS[name]() for name in dict.fromkeys(arguments.log)]
    devices = make_devices(arguments.devices, model_parallel=arguments.model_parallel)
    run = train(config, workdir, devices=devices, **starting, **reading)
    if is_first_process():
        result = run.result
        print(f"test accuracy {100 * result['test_accuracy_last']:.2f} % at the last epoch, ", end="")
        print(f"{100 * result['test_accuracy_best']:.2f} % at epoch {result['best_epoch']}, the best in validation")
        if "test_perplexity_best" in result:
            print(f"test perplexity {result['test_perplexity_last']:.4f} and {result['test_perplexity_best']:.4f}")
        print(f"{workdir}: config.json, metrics.jsonl, checkpoints, result.json")
