"""Where in the network the first number appeared that is not finite."""

from functools import partial

import flax.linen as nn
import jax
from jaxtyping import Array

from bnn_jax.finite import all_finite, leaf_name
from bnn_jax.outputs import logits_of
from bnn_jax.training.experiment import Experiment
from bnn_jax.training.state import TrainState
from bnn_jax.training.step import augmented_batch, forward
from bnn_jax.types import Images, Labels


def first_non_finite_layer(experiment: Experiment, state: TrainState, images: Images, labels: Labels) -> str | None:
    """The first value of the step after `state` that is not finite, in the order in which they are computed.

    These are the parameters, the outputs of the layers on the way forward, the loss, and the gradients on the way back,
    from the last layer to the first.

    Returns:
      In words, as "the output of stage1_block1/conv1"; None if all are finite.
    """
    names: list[str] = []
    finite = jax.jit(partial(_checks, experiment, names))(state, images, labels)
    bad = [name for name, good in zip(names, jax.device_get(finite)) if not good]
    return bad[0] if bad else None


def _checks(experiment: Experiment, names: list[str], state: TrainState, images: Images, labels: Labels) -> list[Array]:
    """Whether each value is finite; the names are left in `names`, in the same order."""
    modules: list[str] = []
    key, x, targets = augmented_batch(experiment, state, images, labels)

    def loss(params):
        flags = []

        def note(following, arguments, keywords, context):
            result = following(*arguments, **keywords)
            if context.method_name == "__call__":
                modules.append("/".join(context.module.path))
                flags.append(all_finite(result))
            return result

        modules.clear()
        with nn.intercept_methods(note):
            returned, _ = forward(experiment, state, params, x, key)
        return targets.mean_of(experiment.loss.apply, logits_of(returned)), flags

    (value, flags), gradient = jax.value_and_grad(loss, has_aux=True)(state.params)
    checks = [(f"the parameter {leaf_name(path)}", all_finite(leaf)) for path, leaf in _leaves(state.params)]
    checks += [(f"the output of {module or 'the network'}", flag) for module, flag in zip(modules, flags, strict=True)]
    checks.append(("the loss", all_finite(value)))
    backwards = sorted(_leaves(gradient), key=lambda item: -_order(modules, item[0]))
    checks += [(f"the gradient of {leaf_name(path)}", all_finite(leaf)) for path, leaf in backwards]
    names[:] = [name for name, _ in checks]
    return [flag for _, flag in checks]


def _order(modules: list[str], path) -> int:
    """When the module that holds the parameter at `path` was first done on the way forward."""
    owners = [leaf_name(path[:end]) for end in range(len(path) - 1, -1, -1)]
    return next(modules.index(owner) for owner in owners if owner in modules)


def _leaves(tree) -> list:
    return jax.tree_util.tree_leaves_with_path(tree)
