"""What training carries from step to step."""

from typing import Any

import flax.struct
from jaxtyping import Array, Float, Int, UInt32

from bnn_jax.training.diagnostics import Flips
from bnn_jax.types import Params

WHICH = ("best", "last")
"""Variables of a run: those of the best validation epoch, and those of the newest checkpoint."""


class TrainState(flax.struct.PyTreeNode):
    """The whole state of a run between two steps.

    Attributes:
      step: steps done.
      params: latent and real weights.
      model_state: what the network carries along without a gradient: batch-norm statistics, states of quantizers.
      opt_state: of the optimizer, the box search included.
      seed: key data from which the order of examples and the augmentation of every step derive.
      keys: the teacher's embeddings of past batches, newest first, for the loss "similarity"; None without it.
      flips: of the latent weights since the last record of diagnostics; None where none are recorded.
      average: of the collections "params" and "batch_stats" over the steps; None where none is kept.
    """

    step: Int[Array, ""]
    params: Params
    model_state: Any
    opt_state: Any
    seed: UInt32[Array, "2"]
    keys: Float[Array, "keys size"] | None = None
    flips: Flips | None = None
    average: dict[str, Any] | None = None

    @property
    def evaluated(self) -> tuple[Params, Any]:
        """Parameters and model state to evaluate and to hand on: the averages, and the newest states of quantizers."""
        if self.average is None:
            return self.params, self.model_state
        statistics = {name: value for name, value in self.average.items() if name != "params"}
        return self.average["params"], self.model_state | statistics


class Best(flax.struct.PyTreeNode):
    """The variables of the epoch with the highest validation accuracy so far, the earliest on a tie."""

    params: Params
    model_state: Any
    accuracy: Float[Array, ""]
    epoch: Int[Array, ""]

    @property
    def evaluated(self) -> tuple[Params, Any]:
        """Parameters and model state, as of a :class:`TrainState`."""
        return self.params, self.model_state


class RunState(flax.struct.PyTreeNode):
    """What a checkpoint of a run holds, beside its config and its log."""

    train: TrainState
    best: Best
