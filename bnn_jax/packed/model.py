"""A frozen network that runs on uint8 images."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from bnn_jax.checks import require
from bnn_jax.compilation import packed_options
from bnn_jax.data import normalize
from bnn_jax.errors import RunError, UsageError
from bnn_jax.finite import require_finite
from bnn_jax.losses import cross_entropy, rows_of
from bnn_jax.outputs import network_logits
from bnn_jax.types import BatchLabels, BatchLogits, Images

DESCRIPTION = "it is {'image_shape': (height, width, channels), 'mean': ..., 'std': ...} of pixels in 0..255"


@dataclass(frozen=True, eq=False)
class PackedModel:
    """A frozen network that runs on uint8 images.

    Attributes:
      model: the Flax module.
      variables: its packed variables.
      metadata: `image_shape`, and `mean` and `std` of the training pixels; of a file also `model` (its settings),
        `num_classes`, `accounting`, `tested`, `versions` and the other texts of its header.
    """

    model: nn.Module
    variables: Any
    metadata: Mapping[str, Any]

    def apply(self, variables: Any, images: Images) -> BatchLogits:
        """:meth:`logits` as a function to transform, of variables like `variables`."""
        images = normalize(images, mean=self.metadata["mean"], std=self.metadata["std"])
        return network_logits(self.model, variables, images)

    def __post_init__(self):
        for name in ("image_shape", "mean", "std"):
            require("metadata", sorted(self.metadata), name in self.metadata, f"must have {name!r}", DESCRIPTION)

    @cached_property
    def num_classes(self) -> int:
        """Of the logits; found by tracing where the metadata do not say it."""
        if "num_classes" in self.metadata:
            return self.metadata["num_classes"]
        images = jax.ShapeDtypeStruct((1, *self.metadata["image_shape"]), jnp.uint8)
        return jax.eval_shape(self.apply, self.variables, images).shape[-1]

    @cached_property
    def _compiled(self):
        return jax.jit(self.apply, compiler_options=packed_options())

    def logits(self, images: Images) -> BatchLogits:
        """Of uint8 images (batch, *image_shape), which need no preparation; compiled once for each batch size.

        Raises:
          ValueError: for images of another dtype or shape, or none.
        """
        return self._compiled(self.variables, jnp.asarray(require_images(self, images)))

    def predict(self, images: Images) -> BatchLabels:
        """The class with the largest of the :meth:`logits` of each image, or of each token.

        Raises:
          ValueError: as :meth:`logits`.
          RunError: if a logit is not finite.
        """
        logits = self.logits(images)
        require_finite("logits", logits, "the network is broken, export its run again", error=RunError)
        return logits.argmax(axis=-1)

    def accuracy(self, batches: Iterable[tuple[Images, BatchLabels]]) -> tuple[float, int]:
        """Share of the images that are predicted as labelled, and how many there are; labels below 0 do not count.

        Raises:
          UsageError: if no image has a label.
          ValueError: if the labels are not one whole number for each image, or one is that of no class.
        """
        examples = correct = 0
        for images, labels in batches:
            predicted, labels = np.asarray(self.predict(images)), np.asarray(labels)
            if np.shape(labels) != predicted.shape or not np.issubdtype(labels.dtype, np.integer):
                raise ValueError(
                    f"`batches` (with labels {labels.dtype} of shape {np.shape(labels)}) must hold a whole number for "
                    f"each image, here {' x '.join(map(str, predicted.shape))}"
                )
            if labels.max(initial=0) >= self.num_classes:
                raise ValueError(
                    f"`batches` (with the label {labels.max()}) must hold labels from 0 to {self.num_classes - 1}, or "
                    "below 0 where there is none"
                )
            examples += int((labels >= 0).sum())
            correct += int((predicted == labels).sum())
        if not examples:
            raise UsageError("`batches` hold no image with a label, so that there is no accuracy; choose others")
        return correct / examples, examples

    def perplexity(self, batches: Iterable[tuple[Images, BatchLabels]]) -> float:
        """exp of the mean cross-entropy of the labels, or of tokens' labels; those below 0 do not count.

        Raises:
          UsageError: if there is no label.
        """
        total, examples = 0.0, 0
        for images, labels in batches:
            logits, own = rows_of(self.logits(images), jnp.asarray(labels))
            losses = np.asarray(cross_entropy(logits, jnp.maximum(own, 0)), np.float64)
            total += losses[np.asarray(own) >= 0].sum()
            examples += int((own >= 0).sum())
        if not examples:
            raise UsageError("`batches` hold no label, so that there is no perplexity; choose others")
        return float(np.exp(total / examples))


def require_images(packed: PackedModel, images: Images) -> Images:
    """Return the images, or refuse those of another dtype or shape than the network's, or none.

    Raises:
      ValueError: naming both.
    """
    shape, wanted = np.shape(images), packed.metadata["image_shape"]
    dtype = getattr(images, "dtype", type(images).__name__)
    if dtype != np.uint8 or shape[1:] != tuple(wanted) or not shape[0]:
        expected = ", ".join(map(str, wanted))
        raise ValueError(f"`images` (={dtype} of shape {shape}) must be uint8 of shape (batch, {expected})")
    return images


def require_packed_model(packed: Any) -> None:
    """Refuse what is no PackedModel, as variables alone.

    Raises:
      TypeError: with how one is made.
    """
    if not isinstance(packed, PackedModel):
        raise TypeError(
            f"`packed` (={type(packed).__name__}) must be a PackedModel; make one: PackedModel(model, freeze(model, "
            "variables, image_shape), {'image_shape': image_shape, 'mean': ..., 'std': ...})"
        )
