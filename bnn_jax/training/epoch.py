"""An epoch of a run, pure: training steps, evaluation, the best variables so far; and a whole run as a scan over it."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int, Num, UInt8, UInt32

from bnn_jax.checks import require
from bnn_jax.data import normalize
from bnn_jax.errors import UsageError
from bnn_jax.finite import all_finite
from bnn_jax.losses import cross_entropy, rows_of
from bnn_jax.optim import bound_statistics
from bnn_jax.outputs import network_logits
from bnn_jax.training.config import Config
from bnn_jax.training.devices import data_shards, keep_sharding, shard_batch
from bnn_jax.training.experiment import Experiment, HyperParameters, ImageInfo, make_experiment
from bnn_jax.training.state import Best, RunState, TrainState
from bnn_jax.training.step import init_state, train_step
from bnn_jax.training.validation import check_teacher
from bnn_jax.types import BatchLabels, Images, Labels, Logits, Metrics, Params

EVALUATION_BATCH = 250
"""Rounded up to a multiple of the devices that share a batch."""

TOP5_CLASSES = 100
"""From so many classes on, as of CIFAR-100 and ImageNet, evaluation counts the five largest logits too."""


class Batches(NamedTuple):
    """Batches to train on, on the device.

    Attributes:
      images: of the whole training split, [examples, ...], or of the batches as they are, [steps, batch, ...].
      labels: of the same examples.
      order: indices of the examples of each batch, [steps, batch]; None where the batches are there as they are.
    """

    images: UInt8[Array, "..."]
    labels: Int[Array, "..."]
    order: Int[Array, "steps batch"] | None = None

    @property
    def steps(self) -> int:
        """Number of batches."""
        return len(self.labels if self.order is None else self.order)

    def at(self, number: Int[Array, ""]) -> tuple[Images, BatchLabels]:
        """Return images and labels of one batch."""
        rows = number if self.order is None else self.order[number]
        return self.images[rows], self.labels[rows]


def epoch_permutation(
    seed: UInt32[Array, "2"], epoch: Int[Array, ""], *, examples: int, batch_size: int
) -> Int[Array, "steps batch"]:
    """Draw the batches of one epoch by (seed, epoch) alone; an incomplete last batch is left out."""
    steps = examples // batch_size
    orders = jax.random.fold_in(jax.random.wrap_key_data(seed), np.uint32(2**32 - 1))  # no step is ever this one
    permutation = jax.random.permutation(jax.random.fold_in(orders, epoch), examples)
    return permutation[: steps * batch_size].reshape(steps, batch_size)


def train_steps(
    experiment: Experiment,
    state: TrainState,
    batches: Batches,
    *,
    first: int | Array = 0,
    count: int | Array | None = None,
    teacher: Any | None = None,
) -> tuple[TrainState, Metrics]:
    """:func:`bnn_jax.training.step.train_step` on `count` of the batches from number `first` on, in one loop.

    `first` and `count`, which may be traced, do not compile again; one compiled body makes every step, so that where a
    run is cut into calls changes no bit of it.

    Args:
      first: number of the first batch.
      count: how many; None goes on to the last.
      teacher: as in :func:`bnn_jax.training.step.train_step`.

    Returns:
      The state after them, and the metrics of each, as many as there are batches, 0 for those that were left out.
    """

    @partial(jax.jit, inline=True)  # traced once, for its shapes and for the loop
    def step(state, number):
        return train_step(experiment, state, *batches.at(number), teacher)

    def body(number, carry):
        state, stacked = carry
        state, metrics = step(state, number)
        return state, jax.tree.map(lambda rows, row: rows.at[number].set(row), stacked, metrics)

    length = batches.steps
    shapes = jax.eval_shape(step, state, jnp.zeros((), jnp.int32))[1]
    stacked = jax.tree.map(lambda row: jnp.zeros((length, *row.shape), row.dtype), shapes)
    first = jnp.asarray(first, jnp.int32)
    end = length if count is None else first + count
    state, stacked = lax.fori_loop(first, jnp.asarray(end, jnp.int32), body, (state, stacked))
    return keep_sharding(state, experiment.devices), stacked  # a loop may leave it elsewhere than its body does


def evaluate(
    experiment: Experiment, params: Params, model_state: Any, images: Images, labels: BatchLabels
) -> dict[str, Float[Array, ""]]:
    """Mean `loss` and `accuracy` over a split, with running batch-norm statistics; every example counts once.

    Of tokens each is an example, and their `perplexity` is there too, exp of the mean cross-entropy, at most 3.4e38.

    Where there are as many as :data:`TOP5_CLASSES`, also `top5_accuracy`, of labels among the five largest logits; of
    equal ones the first counts as the larger.  Examples with a label below 0 are padding; `examples` is the number of
    the others.  Where a logit is not finite there is no prediction: the accuracies are NaN, not those of the first
    class.
    """
    count = len(labels)
    shards = data_shards(experiment.devices)
    size = -(-min(EVALUATION_BATCH, count) // shards) * shards
    order = jnp.arange(-(-count // size) * size).reshape(-1, size)

    losses = {"loss": experiment.loss.monitored} | ({"perplexity": cross_entropy} if labels.ndim > 1 else {})

    def body(totals, indices):
        inside = jnp.broadcast_to((indices < count).reshape(-1, *[1] * (labels.ndim - 1)), (size, *labels.shape[1:]))
        indices = jnp.minimum(indices, count - 1)
        x = normalize(images[indices], mean=experiment.info.mean, std=experiment.info.std)
        x = shard_batch(x, experiment.devices)
        logits = network_logits(experiment.model, {"params": params} | model_state, x)
        logits, own = rows_of(logits, labels[indices])
        counted = inside.reshape(-1) & (own >= 0)
        sums = {name: jnp.where(counted, loss(logits, own), 0).sum() for name, loss in losses.items()}
        correct = {name: (counted & hit).sum() for name, hit in _hits(logits, own).items()}
        finite = all_finite(jnp.where(counted[:, None], logits, 0))
        return (*jax.tree.map(jnp.add, totals[:2], (sums, correct)), totals[2] & finite), None

    none = _hits(jnp.zeros((1, experiment.info.num_classes)), jnp.zeros(1, jnp.int32))
    zeros = (dict.fromkeys(losses, jnp.zeros(())), dict.fromkeys(none, jnp.zeros((), jnp.int32)))
    (sums, correct, finite), _ = lax.scan(body, (*zeros, jnp.array(True)), order)
    examples = jnp.maximum((labels >= 0).sum(), 1)
    accuracies = {name: jnp.where(finite, count / examples, jnp.nan) for name, count in correct.items()}
    means = {name: total / examples.astype(total.dtype) for name, total in sums.items()}
    largest = jnp.finfo(jnp.float32).max  # exp of a mean above 88.7, which is a number like any other
    means |= {name: jnp.minimum(jnp.exp(mean), largest) for name, mean in means.items() if name == "perplexity"}
    return {**means, **accuracies, "examples": (labels >= 0).sum()}


def _hits(logits: Logits, labels: Labels) -> dict[str, Bool[Array, "batch"]]:
    """Whether each label is that of the largest logit, and where there are many classes one of the five largest."""
    hits = {"accuracy": logits.argmax(axis=1) == labels}
    if logits.shape[1] >= TOP5_CLASSES:
        hits["top5_accuracy"] = (lax.top_k(logits, 5)[1] == labels[:, None]).any(axis=1)
    return hits


def first_state(train: TrainState) -> RunState:
    """Make the state of a run before its first step: the best variables so far are those it starts from."""
    return RunState(train, Best(*train.evaluated, jnp.float32(-1.0), jnp.int32(0)))


def end_epoch(
    experiment: Experiment, best: Best, state: TrainState, accuracy: Float[Array, ""], epoch: Array
) -> tuple[Best, dict[str, Array]]:
    """Choose the best variables after an epoch, the earlier ones on a tie; measure what bounds the latent weights."""
    better = accuracy > best.accuracy
    best = jax.tree.map(partial(jnp.where, better), Best(*state.evaluated, accuracy, epoch), best)
    return keep_sharding(best, experiment.devices), bound_statistics(state.params, box=experiment.box)


def epoch(
    run: RunState,
    number: int | Int[Array, ""],
    *,
    train: Callable[[TrainState, Array], tuple[TrainState, Any]],
    evaluate: Callable[[Params, Any], dict[str, Array]],
    end: Callable[..., tuple[Best, dict[str, Array]]],
) -> tuple[RunState, Any, dict[str, Array]]:
    """Train for one epoch, one run or several with a leading axis; as pure as the functions that it is made of.

    :func:`whole_run` gives those of this module; the loop gives theirs jitted, and makes the steps in several calls,
    between which it records, saves and stops.

    Args:
      run: before the epoch, or where it was left in the midst of it.
      number: of the epoch, from 1.
      train: (state, number) -> the state after the steps of the epoch, and what is known of each.
      evaluate: (parameters, model state) -> see :func:`evaluate`, on the validation split.
      end: (best so far, state, accuracy, number) -> best and statistics, see :func:`end_epoch`.

    Returns:
      The run after the epoch, what `train` tells of the steps, and what a record of the evaluation holds.
    """
    state, steps = train(run.train, number)
    found = evaluate(*state.evaluated)
    best, statistics = end(run.best, state, found["accuracy"], number)
    evaluation = {f"validation_{name}": value for name, value in found.items() if name != "examples"} | statistics
    return RunState(state, best), steps, evaluation


class Outcome(NamedTuple):
    """All that a run ends with.

    Attributes:
      run: the state after the last epoch, and the best variables.
      steps: metrics of every step.
      evaluations: after each epoch `validation_loss`, `validation_accuracy` and what bounds the latent weights.
      test: accuracy on the test split of the "best" and the "last" variables.
    """

    run: RunState
    steps: dict[str, Num[Array, "epochs steps"]]
    evaluations: dict[str, Float[Array, " epochs"]]
    test: dict[str, Float[Array, ""]]


def whole_run(config: Config, info: ImageInfo, *, examples: int) -> Callable[..., Outcome]:
    """``(seed, hyper, data) -> Outcome``: a whole run, for jit to compile and vmap to map over seeds and `hyper`.

    Nothing stops it: one that diverges goes on to its end, with accuracies that are NaN where logits are not finite.

    `hyper` is what :func:`bnn_jax.training.experiment.hyper_parameters` gives, `data` has images and labels of the
    splits "train", "validation" and "test".

    Args:
      config: validated; its seed and hyper-parameters do not enter.
      info, examples: of the training split.

    Raises:
      UsageError: for a config that learns from a teacher or starts from `init_from`, neither of which enters.
    """
    check_teacher(config, given=False)
    rule = "is for `train`; whole runs start from random weights"
    require("init_from", config.init_from, config.init_from is None, rule, error=UsageError)
    total_steps = config.epochs * (examples // config.batch_size)

    def run(seed: UInt32[Array, ""], hyper: HyperParameters, data: dict[str, tuple[Images, BatchLabels]]) -> Outcome:
        experiment = make_experiment(config, info, total_steps=total_steps, **hyper)

        def train(state, number):
            order = epoch_permutation(state.seed, number, examples=examples, batch_size=config.batch_size)
            return train_steps(experiment, state, Batches(*data["train"], order))

        def evaluate_on(split, params, model_state):
            return evaluate(experiment, params, model_state, *data[split])

        parts = {"evaluate": partial(evaluate_on, "validation"), "end": partial(end_epoch, experiment)}

        def body(run, number):
            run, steps, evaluation = epoch(run, number, train=train, **parts)
            return run, (steps, evaluation)

        numbers = jnp.arange(1, config.epochs + 1)
        run, (steps, evaluations) = lax.scan(body, first_state(init_state(experiment, seed)), numbers)
        test = {
            name: evaluate_on("test", *variables.evaluated)["accuracy"]
            for name, variables in (("best", run.best), ("last", run.train))
        }
        return Outcome(run, steps, evaluations, test)

    return run
