"""How a set is divided into training, validation and test: of every class the same share, by a seed alone."""

import numpy as np
from jaxtyping import Int

from bnn_jax.checks import require
from bnn_jax.errors import UsageError


def check_own_validation(validation_examples: int | None, split_seed: int, source: str) -> None:
    """Refuse to take a validation split out of the training images of a set that has one.

    Raises:
      UsageError: if that is asked for.
    """
    for argument, value in (("validation_examples", validation_examples), ("split_seed", split_seed or None)):
        if value is not None:
            raise UsageError(f"`{argument}` (={value}) must be left out: {source} has its own validation split")


def split_off_validation(
    labels: Int[np.ndarray, "count"], validation_examples: int | None, split_seed: int
) -> tuple[Int[np.ndarray, "train"], Int[np.ndarray, "validation"]]:
    """Which training examples stay, and which make the validation split; both in their old order.

    Of every class its share of `validation_examples`, or of a tenth of all, goes to validation: the first of its
    examples in :func:`permutation`, see :func:`stratified`.

    Raises:
      UsageError: if validation has no example, or training none of a class.
    """
    count = max(1, len(labels) // 10) if validation_examples is None else validation_examples
    _check_validation_count(count, len(labels) - len(np.unique(labels)))
    taken, kept = stratified(permutation(len(labels), seed=split_seed), labels, count)
    return np.sort(kept), np.sort(taken)


def in_three(
    labels: Int[np.ndarray, "count"], validation_examples: int | None, split_seed: int
) -> dict[str, Int[np.ndarray, "part"]]:
    """Of each class 60 % for training, 20 % for validation, 20 % for the test; all in the order of the permutation.

    Test is taken first, so that it does not depend on the size of the validation split.

    Raises:
      UsageError: if validation has no example, or training none of a class.
    """
    test_count = round(len(labels) / 5)
    count = test_count if validation_examples is None else validation_examples
    _check_validation_count(count, len(labels) - test_count - len(np.unique(labels)))
    test, rest = stratified(permutation(len(labels), seed=split_seed), labels, test_count)
    validation, train = stratified(rest, labels, count)
    return {"train": train, "validation": validation, "test": test}


def _check_validation_count(count: int, most: int) -> None:
    if most < 1:
        raise UsageError("the set has too few examples of its classes to be divided; give validation and test splits")
    rule = f"must be 1 to {most}, so that validation has examples and training one of each class"
    require("validation_examples", count, 1 <= count <= most, rule, error=UsageError)


def permutation(count: int, *, seed: int) -> np.ndarray:
    """A permutation of range(count) that depends on nothing but `seed`.

    Ranks of raw PCG64 outputs: NumPy promises the raw bits of a bit generator for ever, those of
    `Generator.permutation` only within a version.

    >>> permutation(5, seed=0)
    array([3, 2, 1, 0, 4])
    """
    return np.argsort(np.random.PCG64(seed).random_raw(count), kind="stable")


def stratified(order: np.ndarray, labels: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Divide the indices `order` into `count` of them and the rest, with the classes in equal proportion.

    A class of n gives floor(n count / len(order)), and the classes with the largest remainders one more until it is
    `count`; of each class the first in `order` are taken, and one at least is left, for which `count` is at most
    len(order) less the number of classes.

    >>> stratified(np.arange(6), np.array([0, 0, 1, 1, 1, 1]), 3)
    (array([0, 2, 3]), array([1, 4, 5]))
    """
    _, classes, sizes = np.unique(labels[order], return_inverse=True, return_counts=True)
    quotas, remainders = np.divmod(sizes * count, len(order))
    while missing := count - quotas.sum():
        free = np.flatnonzero(quotas < sizes - 1)
        quotas[free[np.argsort(-remainders[free], kind="stable")][:missing]] += 1
    chosen = np.concatenate([np.flatnonzero(classes == c)[:quota] for c, quota in enumerate(quotas)])
    return order[chosen], np.delete(order, chosen)
