r"""Losses between a network and its teacher: (network, teacher) -> one value for each example.

The teacher is held constant by the caller; all of these are functions of two arrays, and DISTILLATION_LOSSES applies
them to the outputs of two whole networks.
"""

from collections.abc import Callable, Iterator, Mapping

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from bnn_jax.checks import check_arrays, look_up
from bnn_jax.outputs import Outputs
from bnn_jax.types import Key, Logits


@check_arrays
def distribution_loss(logits: Logits, teacher_logits: Logits) -> Float[Array, "batch"]:
    r"""ReActNet's distribution loss: cross-entropy to the teacher's class probabilities.

    L_i = -sum_c p_t(c) log p_s(c),  p = softmax(logits);  dL/dlogits = p_s - p_t

    >>> distribution_loss(jnp.array([[0.0, 0.0]]), jnp.array([[5.0, -5.0]]))
    Array([0.6931472], dtype=float32)

    Reference: Liu et al., ReActNet, 2020, arXiv:2003.03488.
    """
    return -(jax.nn.softmax(teacher_logits) * jax.nn.log_softmax(logits)).sum(axis=-1)


@check_arrays
def knowledge_distillation(
    logits: Logits, teacher_logits: Logits, *, temperature: float | Array = 1.0
) -> Float[Array, "batch"]:
    r"""Hinton's distillation: divergence of the softened class probabilities, 0 for equal ones.

    L_i = T^2 sum_c p_t(c) (log p_t(c) - log p_s(c)),  p = softmax(logits / T);  dL/dlogits = T (p_s - p_t)

    Args:
      temperature: T, positive; the factor T^2 keeps the size of the gradient.

    >>> print(knowledge_distillation(jnp.array([[1.0, 0.0]]), jnp.array([[3.0, 2.0]]), temperature=4.0))
    [0.]

    Reference: Hinton, Vinyals, Dean, Distilling the Knowledge in a Neural Network, 2015, arXiv:1503.02531.
    """
    own, wanted = jax.nn.log_softmax(logits / temperature), jax.nn.log_softmax(teacher_logits / temperature)
    return temperature**2 * (jnp.exp(wanted) * (wanted - own)).sum(axis=-1)


@check_arrays
def attention_matching(
    maps: Float[Array, "batch h w channels"], teacher_maps: Float[Array, "batch h w others"]
) -> Float[Array, "batch"]:
    r"""Real-to-Binary's attention matching as in the paper: where in the image the activations are large.

    L_i = || Q_s / ||Q_s||_2 - Q_t / ||Q_t||_2 ||_2,  Q = sum over channels of A^2, as a vector over the pixels

    Each map has unit length; the distance is not squared, not divided by the pixels, and summed over the blocks: at
    most sqrt(2) a block.  The paper's weight could not be found; for larq zoo's 30 see :func:`attention_mse`.
    It does not change when A is rescaled, nor with the number of channels; 0, with gradient 0, for equal maps.

    Raises:
      ValueError: if the maps are not of the same height and width.

    >>> a = jnp.array([[[[1.0]], [[0.0]]]])
    >>> print(attention_matching(3 * a, a), attention_matching(a[:, ::-1], a))
    [0.] [1.4142135]

    Reference: Martinez et al., Training Binary Neural Networks with Real-to-Binary Convolutions, 2020, section 4.2,
    arXiv:2003.11535.
    """
    own, wanted = _attention(maps, teacher_maps)
    return _norm(_unit(own) - _unit(wanted))[:, 0]


@check_arrays
def attention_mse(
    maps: Float[Array, "batch h w channels"], teacher_maps: Float[Array, "batch h w others"]
) -> Float[Array, "batch"]:
    r"""Real-to-Binary's attention matching as in larq zoo, to which the weight 30 belongs.

    L_i = mean over the pixels of (Q_s / max Q_s - Q_t / max Q_t)^2,  Q = mean over channels of A^2

    The largest pixel of each map is 1; of several blocks it is the mean: at most 1.  The gradient passes through the
    maximum, at its first pixel.  A map of zeros stays zero, where larq zoo divides 0 by 0.

    Raises:
      ValueError: if the maps are not of the same height and width.

    >>> a = jnp.array([[[[2.0]], [[1.0]]]])
    >>> print(attention_mse(3 * a, a), attention_mse(a[:, ::-1], a))
    [0.] [0.5625]

    Reference: larq zoo, `knowledge_distillation.py`, AttentionMatchingLossLayer; after Martinez et al., Training Binary
    Neural Networks with Real-to-Binary Convolutions, 2020, arXiv:2003.11535.
    """
    own, wanted = (_with_largest_one(q) for q in _attention(maps, teacher_maps))
    return ((own - wanted) ** 2).mean(axis=-1)


def _attention(maps: Array, teacher_maps: Array) -> tuple[Array, Array]:
    """The sum over channels of the squares, as a vector over the pixels, of both; factors cancel in what follows."""
    return tuple((a * a).sum(axis=-1).reshape((len(a), -1)) for a in (maps, teacher_maps))


@check_arrays
def feature_distillation(
    features: Float[Array, "batch ..."], teacher_features: Float[Array, "batch ..."]
) -> Float[Array, "batch"]:
    r"""DGRL's block-wise distillation: squared distance of the features at unit length.

    L_i = || F_s / ||F_s|| - F_t / ||F_t|| ||_2^2 = 2 - 2 cos(F_s, F_t)

    How the paper normalises could not be confirmed; unit length for each example is a reading.

    Raises:
      ValueError: if the shapes differ.

    >>> print(feature_distillation(jnp.array([[2.0, 0.0]]), jnp.array([[0.0, 1.0]])))
    [2.]

    Reference: Ye, Zhang, Wang, Distillation Guided Residual Learning for Binary Convolutional Neural Networks, 2020,
    arXiv:2007.05223.
    """
    _same_shape(features, teacher_features)
    difference = _unit(features.reshape((len(features), -1))) - _unit(teacher_features.reshape((len(features), -1)))
    return (difference * difference).sum(axis=-1)


@check_arrays
def standardized_distillation(
    activations: Float[Array, "batch ..."], teacher_activations: Float[Array, "batch ..."]
) -> Float[Array, "batch"]:
    r"""DIR-Net's distillation of normalised activations: mean squared distance after standardisation.

    L_i = mean (a^_s - a^_t)^2,  a^ = (a - mean a) / std a over all values of an example; 0 where a is constant

    The paper's exact form could not be confirmed; this is a reading.

    Raises:
      ValueError: if the shapes differ.

    >>> a = jnp.array([[0.0, 1.0]])
    >>> [f"{float(standardized_distillation(a, b)[0]):.3f}" for b in (a, 5 * a + 1, -a)]
    ['0.000', '0.000', '4.000']

    Reference: Qin et al., Distribution-sensitive Information Retention for Accurate Binary Neural Network, 2022,
    arXiv:2109.12338.
    """
    _same_shape(activations, teacher_activations)
    centred = [a.reshape((len(a), -1)) for a in (activations, teacher_activations)]
    centred = [_unit(_centred(a)) for a in centred]
    # A standardised vector of n values has length sqrt(n), which cancels the mean's 1 / n.
    difference = centred[0] - centred[1]
    return (difference * difference).sum(axis=-1)


@check_arrays
def embedding_distillation(
    embeddings: Float[Array, "batch size"],
    teacher_embeddings: Float[Array, "batch size"],
    *,
    temperature: float | Array = 0.2,
) -> Float[Array, "batch"]:
    r"""S2-BNN's distillation without labels, as released: the components of an embedding are its classes.

    L_i = -sum_c p_t(c) log p_s(c),  p = softmax over the components of z / (||z||_2 T)

    It is :func:`similarity_distillation` with the unit vectors of the embedding space for keys.

    Args:
      embeddings: z of the network, of any length.
      teacher_embeddings: z of the teacher.
      temperature: T, positive.

    >>> loss = embedding_distillation(jnp.array([[1.0, 1.0]]), jnp.array([[3.0, 0.0]]))
    >>> print(f"{float(loss[0]):.4f}")
    0.6931

    Reference: Shen et al., S2-BNN: Bridging the Gap Between Self-Supervised Real and 1-bit Neural Networks via Guided
    Distribution Calibration, 2021, arXiv:2102.08946; szq0214/S2-BNN.
    """
    return distribution_loss(*(_unit(z) / temperature for z in (embeddings, teacher_embeddings)))


@check_arrays
def similarity_distillation(
    embeddings: Float[Array, "batch size"],
    teacher_embeddings: Float[Array, "batch size"],
    keys: Float[Array, "keys size"],
    *,
    temperature: float | Array = 0.2,
) -> Float[Array, "batch"]:
    r"""Distillation without labels from a queue: which of many keys an image resembles.

    L_i = -sum_j p_t(j) log p_s(j),  p = softmax_j(cos(z_i, k_j) / T)

    A reading of S2-BNN, whose program compares with no keys: see :func:`embedding_distillation`.

    Args:
      embeddings: z of the network, of any length.
      teacher_embeddings: z of the teacher.
      keys: a queue of the teacher's embeddings of earlier images; see :func:`enqueue`.
      temperature: T, positive.

    >>> keys = jnp.array([[1.0, 0.0], [0.0, 1.0]])
    >>> loss = similarity_distillation(jnp.array([[1.0, 1.0]]), jnp.array([[3.0, 0.0]]), keys)
    >>> print(f"{float(loss[0]):.4f}")
    0.6931

    Reference: Shen et al., S2-BNN: Bridging the Gap Between Self-Supervised Real and 1-bit Neural Networks via Guided
    Distribution Calibration, 2021, arXiv:2102.08946.
    """
    unit_keys = _unit(keys)
    similarities = [_unit(z) @ unit_keys.T / temperature for z in (embeddings, teacher_embeddings)]
    return distribution_loss(*similarities)


@check_arrays
def enqueue(keys: Float[Array, "keys size"], embeddings: Float[Array, "batch size"]) -> Float[Array, "keys size"]:
    """The queue after a batch: its embeddings at unit length first, the oldest keys dropped.

    >>> print(enqueue(jnp.array([[1.0, 0.0], [0.0, 1.0]]), jnp.array([[0.0, -2.0]])))
    [[ 0. -1.]
     [ 1.  0.]]

    Reference: He et al., Momentum Contrast for Unsupervised Visual Representation Learning, 2020, arXiv:1911.05722.
    """
    return jnp.concatenate([_unit(embeddings), keys])[: len(keys)]


def shared_stages(network: Outputs, teacher: Outputs) -> Iterator[tuple[str, Array, Array]]:
    """(name, output there, teacher's output there) of what both networks name among their intermediates.

    That is each stage, or in its place its blocks, where both networks name the same ones: stages of different depths
    end where the other's end.  `features` are left out.

    Raises:
      ValueError: if there is none.
    """
    names = [name for name in network.intermediates if name in teacher.intermediates and name != "features"]
    if not names:
        raise ValueError(
            f"`teacher` (with {', '.join(teacher.intermediates) or 'none'}) shares no stage with the network, which "
            f"has {', '.join(network.intermediates) or 'none'}; choose a teacher of the same family"
        )
    blocks = lambda of, stage: {name for name in of.intermediates if name.startswith(f"{stage}_")}
    left_out: set[str] = set()
    for stage in names:
        own, theirs = blocks(network, stage), blocks(teacher, stage)
        left_out |= {stage} if own and own == theirs else own
    for name in (name for name in names if name not in left_out):
        yield name, network.intermediates[name], teacher.intermediates[name]


def _over_stages(loss: Callable[[Array, Array], Array], *, mean: bool = False) -> Callable[..., Array]:
    """The sum or the mean of `loss` over the stages that both networks have."""

    def total(network, teacher, **_):
        losses = []
        for name, own, wanted in shared_stages(network, teacher):
            try:
                losses.append(loss(own, wanted))
            except ValueError as error:
                raise ValueError(f"{name} of the network and of its teacher do not match: {error}") from None
        return sum(losses) / len(losses) if mean else sum(losses)

    return total


DISTILLATION_LOSSES: dict[str, Callable[..., Float[Array, "batch"]]] = {
    "distribution": lambda network, teacher, **_: distribution_loss(network.logits, teacher.logits),
    "knowledge": lambda network, teacher, *, temperature, **_: knowledge_distillation(
        network.logits, teacher.logits, temperature=temperature
    ),
    "attention": _over_stages(attention_matching),
    "attention_mse": _over_stages(attention_mse, mean=True),
    "features": _over_stages(feature_distillation),
    "standardized": _over_stages(standardized_distillation),
    "embedding": lambda network, teacher, *, temperature, **_: embedding_distillation(
        network.logits, teacher.logits, temperature=temperature
    ),
    "similarity": lambda network, teacher, *, temperature, keys: similarity_distillation(
        network.logits, teacher.logits, keys, temperature=temperature
    ),
}
"""(outputs, teacher's outputs, temperature=, keys=) -> a loss for each example; of stages or blocks the sum over them,
of attention_mse the mean."""


def distilled(
    label_loss: Float[Array, ""],
    network: Outputs,
    teacher: Outputs,
    *,
    losses: Mapping[str, float],
    label_weight: float = 1.0,
    temperature: float = 1.0,
    keys: Float[Array, "keys size"] | None = None,
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
    r"""The objective of a taught network, and the batch means of its parts.

    label_weight * label_loss + sum over names of losses[name] * mean over the batch of DISTILLATION_LOSSES[name]

    Raises:
      ValueError: if the two networks do not fit together.

    >>> same = Outputs(jnp.array([[0.0, 0.0]]), {})
    >>> objective, parts = distilled(jnp.array(2.0), same, same, losses={"knowledge": 3.0, "distribution": 1.0})
    >>> print(f"{objective:.4f}", {name: f"{part:.4f}" for name, part in parts.items()})
    2.6931 {'knowledge': '0.0000', 'distribution': '0.6931'}
    """
    parts = {
        name: look_up("losses", name, DISTILLATION_LOSSES)(network, teacher, temperature=temperature, keys=keys).mean()
        for name in losses
    }
    return label_weight * label_loss + sum(losses[name] * part for name, part in parts.items()), parts


def initial_keys(key: Key, *, count: int, size: int) -> Float[Array, "count size"]:
    """A queue for :func:`similarity_distillation` before the first batch: random directions."""
    return _unit(jax.random.normal(key, (count, size)))


def _same_shape(own: Array, wanted: Array) -> None:
    if own.shape != wanted.shape:
        raise ValueError(f"the teacher's shape {wanted.shape} must be the network's, {own.shape}; give both one width")


def _norm(x: Float[Array, "batch size"]) -> Float[Array, "batch 1"]:
    """Euclidean length, with gradient 0 where it is 0."""
    squares = (x * x).sum(axis=-1, keepdims=True)
    return jnp.where(squares > 0, jnp.sqrt(jnp.where(squares > 0, squares, 1)), 0)


def _unit(x: Float[Array, "batch size"]) -> Float[Array, "batch size"]:
    length = _norm(x)
    return x / jnp.where(length > 0, length, 1)


def _centred(x: Float[Array, "batch size"]) -> Float[Array, "batch size"]:
    """x less its mean; 0 where that is rounding alone."""
    centred = x - x.mean(axis=1, keepdims=True)
    rounding = 4 * jnp.finfo(x.dtype).eps * jnp.abs(x).max(axis=1, keepdims=True)
    return jnp.where(jnp.abs(centred).max(axis=1, keepdims=True) > rounding, centred, 0)


def _with_largest_one(q: Float[Array, "batch size"]) -> Float[Array, "batch size"]:
    """q >= 0 divided by its largest value; zeros stay."""
    # Not `max`: under jit its gradient can be 0/0.
    largest = jnp.take_along_axis(q, q.argmax(axis=-1, keepdims=True), axis=-1)
    return q / jnp.where(largest > 0, largest, 1)
