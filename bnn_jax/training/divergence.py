"""Where in the network the first number appeared that is not finite, as :mod:`bnn_jax.finite` means it."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import numpy as np
from jaxtyping import Array

from bnn_jax.data import normalize
from bnn_jax.finite import first_non_finite, leaf_name, non_finite_counts, told
from bnn_jax.outputs import apply_network, logits_of
from bnn_jax.training.experiment import Experiment
from bnn_jax.training.state import TrainState
from bnn_jax.training.step import augmented_batch, forward, train_step
from bnn_jax.types import BatchLabels, Images, Params

STATES = {
    "params": "the parameter",
    "model_state": "the network's state",
    "opt_state": "the optimizer's state",
    "average": "the average of",
}


@flax.struct.dataclass
class Check:
    """What of an array is not finite."""

    counts: Array
    name: str = flax.struct.field(pytree_node=False)
    size: int = flax.struct.field(pytree_node=False)


def first_non_finite_layer(
    checks: Callable[..., list[Check]], state: TrainState, images: Images, labels: BatchLabels, *others: Any
) -> str | None:
    """The first array of the step after `state` that is not finite, in the order in which they are computed.

    These are those of the state, the outputs of the layers on the way forward, the loss, the gradients on the way back,
    from the last layer to the first, and those of the state after the step.

    Args:
      checks: jitted, (state, images, labels, *others) -> what :func:`checks_of_step` finds.

    Returns:
      In words, as "the output of stage1_block1/conv1 (3 NaN of 40)"; None if all are finite.
    """
    found = _first_of({field: getattr(state, field) for field in STATES})
    return found or _first(checks, state, images, labels, *others)


def first_non_finite_output(
    checks: Callable[..., list[Check]], params: Params, model_state: Any, batches: Iterable[Images]
) -> str | None:
    """The first array that is not finite in an evaluation, as :func:`first_non_finite_layer` tells of a step."""
    found = _first_of({"params": params, "model_state": model_state})
    return found or next(filter(None, (_first(checks, params, model_state, images) for images in batches)), None)


def _first_of(states: dict[str, Any]) -> str | None:
    each = ((STATES[field], first_non_finite(tree)) for field, tree in states.items())
    return next((f"{what} {found}" for what, found in each if found is not None), None)


def _first(checks: Callable[..., list[Check]], *arguments: Any) -> str | None:
    try:
        found = jax.device_get(checks(*arguments))
    except jax.errors.UnexpectedTracerError:  # what is computed inside a lifted transformation cannot be taken out
        return None
    return next((told(check.name, check.counts, check.size) for check in found if check.counts.any()), None)


def checks_of_step(
    experiment: Experiment, state: TrainState, images: Images, labels: BatchLabels, teacher: Any | None
) -> list[Check]:
    """What is not finite of the layers' outputs, the loss, the gradients and the state after a step, in this order."""
    key, x, targets = augmented_batch(experiment, state, images, labels)

    def loss(params):
        with _noted() as outputs:
            returned, _ = forward(experiment, state, params, x, key)
        return targets.mean_of(experiment.loss.apply, logits_of(returned)), outputs

    (value, outputs), gradient = jax.value_and_grad(loss, has_aux=True)(state.params)
    modules = [check.name for check in outputs]
    backwards = sorted(jax.tree_util.tree_leaves_with_path(gradient), key=lambda item: -_order(modules, item[0]))
    after, _ = train_step(experiment, state, images, labels, teacher)
    return [
        *outputs,
        _check("the loss", value),
        *(_check(f"the gradient of {leaf_name(path)}", leaf) for path, leaf in backwards),
        *(
            _check(f"{what} {leaf_name(path)} after the step", leaf)
            for field, what in STATES.items()
            for path, leaf in jax.tree_util.tree_leaves_with_path(getattr(after, field))
        ),
    ]


def checks_of_evaluation(experiment: Experiment, params: Params, model_state: Any, images: Images) -> list[Check]:
    """What is not finite of the layers' outputs in an evaluation."""
    x = normalize(images, mean=experiment.info.mean, std=experiment.info.std)
    with _noted() as outputs:
        apply_network(experiment.model, {"params": params} | model_state, x)
    return outputs


@contextmanager
def _noted() -> Iterator[list[Check]]:
    """Check what modules return, in the order in which they are done."""
    outputs: list[Check] = []

    def note(following, arguments, keywords, context):
        result = following(*arguments, **keywords)
        if context.method_name == "__call__":
            outputs.append(_check(_output_of("/".join(context.module.path)), result))
        return result

    with nn.intercept_methods(note):
        yield outputs


def _output_of(module: str) -> str:
    return f"the output of {module or 'the network'}"


def _check(name: str, tree: Any) -> Check:
    leaves = jax.tree.leaves(tree)
    return Check(sum(map(non_finite_counts, leaves)), name, sum(map(np.size, leaves)))


def _order(outputs: list[str], path: tuple[Any, ...]) -> int:
    """When the module that holds the parameter at `path` was first done on the way forward."""
    owners = [_output_of(leaf_name(path[:end])) for end in range(len(path) - 1, -1, -1)]
    return next(outputs.index(owner) for owner in owners if owner in outputs)
