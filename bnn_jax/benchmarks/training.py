"""Benchmark of training: a step of Deep Frank-Wolfe beside one of Adam; a scan beside single steps and PyTorch's."""

from collections.abc import Callable
from dataclasses import replace
from importlib.metadata import version
from importlib.util import find_spec
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bnn_jax.analysis.tables import TEXT, Tables
from bnn_jax.cores import usable_cores
from bnn_jax.timing import interleaved_seconds, median_ms
from bnn_jax.training.config import Config, load_config, select_optimizer
from bnn_jax.training.epoch import Batches
from bnn_jax.training.experiment import ImageInfo, hyper_parameters
from bnn_jax.training.programs import make_programs

CIFAR10 = ImageInfo((32, 32, 3), 10, (125.3, 123.0, 113.9), (63.0, 62.1, 66.7))


def benchmark_training(config: Config, *, repeats: int = 20, scan_repeats: int = 5) -> dict[str, Any]:
    """Times of a training step on random images of CIFAR-10's shape, compilation left out.

    Where PyTorch is installed, it trains the same XNOR-ResNet (:mod:`bnn_jax.benchmarks.torch_peer`) beside the scan,
    in either of its memory formats.

    Args:
      config: model, batch size and optimizers; must have settings for dfw and adam.
      repeats: single jitted steps of each optimizer, one of each in turn.
      scan_repeats: rounds of 20 single steps, one scan of 20 steps, PyTorch's 20 steps, and evaluations.

    Returns:
      Medians in milliseconds a step and the ratios `dfw_over_adam` and `scan_over_single`, with all the times; with
      PyTorch also `images_per_second_over_torch` of the scan and `evaluation_over_torch`, over the faster format.
    """
    rng = np.random.default_rng(0)
    examples, steps = 2560, 20
    images = jnp.asarray(rng.integers(0, 256, (examples, *CIFAR10.shape), dtype=np.uint8))
    labels = jnp.asarray(rng.integers(0, 10, examples, dtype=np.int32))
    order = jnp.asarray(rng.integers(0, examples, (steps, config.batch_size), dtype=np.int32))

    def stepper(name: str, rows) -> Callable[[], Any]:
        settings = replace(config, optim=select_optimizer(config, name))
        programs = make_programs(settings, CIFAR10, examples=examples)
        state = programs.init(np.uint32(0))

        def run():
            nonlocal state
            for row in rows:
                state, metrics = programs.train(state, Batches(images, labels, row), hyper_parameters(settings))
            return state, metrics

        return run

    def evaluator() -> Callable[[], Any]:
        programs = make_programs(replace(config, optim=select_optimizer(config, "dfw")), CIFAR10, examples=examples)
        state = programs.init(np.uint32(0))
        return lambda: programs.evaluate(state.params, state.model_state, images, labels)

    single = interleaved_seconds({name: stepper(name, [order[:1]]) for name in ("dfw", "adam")}, repeats=repeats)
    rounds = {"single": stepper("dfw", [order[i : i + 1] for i in range(steps)]), "scan": stepper("dfw", [order])}
    rounds |= {"evaluation": evaluator(), **_torch_rounds(config, images, labels, order)}
    loops = interleaved_seconds(rounds, repeats=scan_repeats)
    milliseconds = {
        "step_dfw_ms": median_ms(single["dfw"]),
        "step_adam_ms": median_ms(single["adam"]),
        "step_of_20_single_ms": median_ms(loops["single"]) / steps,
        "step_of_scan_20_ms": median_ms(loops["scan"]) / steps,
    }
    milliseconds |= {f"{name}_step_ms": median_ms(loops[name]) / steps for name in loops if name in TORCH_STEPS}
    return milliseconds | {
        "dfw_over_adam": milliseconds["step_dfw_ms"] / milliseconds["step_adam_ms"],
        "scan_over_single": milliseconds["step_of_scan_20_ms"] / milliseconds["step_of_20_single_ms"],
        **_over_torch(loops),
        "seconds": {**{f"step_{name}": times for name, times in single.items()}, **loops},
    }


TORCH_STEPS = ("torch_channels_last", "torch_nchw")


def _torch_rounds(config: Config, images, labels, order) -> dict[str, Callable[[], Any]]:
    """PyTorch's 20 steps and its evaluation of all images, in each memory format, where it is installed.

    On a CPU, where it runs, and for the network and loss that :mod:`bnn_jax.benchmarks.torch_peer` has.
    """
    peer = load_config("cifar10_xnor_resnet20")
    same = replace(config.model, width=peer.model.width) == peer.model and config.loss == peer.loss
    if find_spec("torch") is None or jax.default_backend() != "cpu" or not same:
        return {}
    import torch

    from bnn_jax.benchmarks.torch_peer import Trainer, XnorResNet

    torch.set_num_threads(len(usable_cores()))
    images = torch.from_numpy(np.array(images)).permute(0, 3, 1, 2).contiguous()
    labels, order = torch.from_numpy(np.array(labels, np.int64)), torch.from_numpy(np.array(order, np.int64))
    rounds = {}
    for name in TORCH_STEPS:
        trainer = Trainer(
            XnorResNet(width=config.model.width or 16),
            channels_last=name == TORCH_STEPS[0],
            mean=CIFAR10.mean,
            std=CIFAR10.std,
        )

        def train(trainer=trainer):
            return [trainer.step(images[rows], labels[rows]) for rows in order]

        def evaluate(trainer=trainer):
            return [(trainer.evaluate(x) == y).sum().item() for x, y in zip(images.split(500), labels.split(500))]

        rounds |= {name: train, f"{name}_evaluation": evaluate}
    return rounds


def _over_torch(loops: dict[str, list[float]]) -> dict[str, Any]:
    if TORCH_STEPS[0] not in loops:
        return {}
    medians = {name: median_ms(seconds) for name, seconds in loops.items()}
    return {
        "images_per_second_over_torch": min(medians[name] for name in TORCH_STEPS) / medians["scan"],
        "evaluation_over_torch": min(medians[f"{name}_evaluation"] for name in TORCH_STEPS) / medians["evaluation"],
        "torch": version("torch"),
    }


def print_training(found: dict[str, Any], tables: Tables = TEXT) -> None:
    """Print the medians and the ratios of :func:`benchmark_training`."""
    shown = {name: value for name, value in found.items() if name != "seconds"}
    rows = [(name, value if isinstance(value, str) else f"{value:.3f}") for name, value in shown.items()]
    tables.print(("measured", "value"), rows)
