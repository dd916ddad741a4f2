r"""Losses between a network and its teacher: (network, teacher) -> one value for each example.

The teacher is held constant by the caller; all of these are functions of two arrays, and DISTILLATION_LOSSES applies
them to the outputs of two whole networks.
"""

from collections.abc import Callable, Iterator, Mapping

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from bnn_jax.outputs import Outputs
from bnn_jax.types import Key, Logits


def distribution_loss(logits: Logits, teacher_logits: Logits) -> Float[Array, "batch"]:
    r"""ReActNet's distribution loss: cross-entropy to the teacher's class probabilities.

    L_i = -sum_c p_t(c) log p_s(c),  p = softmax(logits);  dL/dlogits = p_s - p_t

    >>> distribution_loss(jnp.array([[0.0, 0.0]]), jnp.array([[5.0, -5.0]]))
    Array([0.6931472], dtype=float32)

    Reference: Liu et al., ReActNet, 2020, arXiv:2003.03488.
    """
    return -(jax.nn.softmax(teacher_logits) * jax.nn.log_softmax(logits)).sum(axis=-1)


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


def attention_matching(
    maps: Float[Array, "batch h w channels"], teacher_maps: Float[Array, "batch h w others"]
) -> Float[Array, "batch"]:
    r"""Real-to-Binary's attention matching: where in the image the activations are large.

    L_i = || Q_s / ||Q_s|| - Q_t / ||Q_t|| ||_2,  Q = sum over channels of A^2, as a vector over the pixels

    It does not change when A is rescaled, nor with the number of channels; 0, with gradient 0, for equal maps.

    Raises:
      ValueError: if the maps are not of the same height and width.

    >>> a = jnp.array([[[[1.0]], [[0.0]]]])
    >>> print(attention_matching(3 * a, a), attention_matching(a[:, ::-1], a))
    [0.] [1.4142135]

    Reference: Martinez et al., Training Binary Neural Networks with Real-to-Binary Convolutions, 2020,
    arXiv:2003.11535.
    """
    if maps.shape[:3] != teacher_maps.shape[:3]:
        raise ValueError(
            f"`teacher_maps` (of shape {teacher_maps.shape}) must have the batch, height and width of `maps`, "
            f"{maps.shape[:3]}"
        )
    attention = [_unit((a * a).sum(axis=-1).reshape((len(a), -1))) for a in (maps, teacher_maps)]
    return _norm(attention[0] - attention[1])[:, 0]


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
    centred = [_unit(a - a.mean(axis=1, keepdims=True)) for a in centred]
    # A standardised vector of n values has length sqrt(n), which cancels the mean's 1 / n.
    difference = centred[0] - centred[1]
    return (difference * difference).sum(axis=-1)


def similarity_distillation(
    embeddings: Float[Array, "batch size"],
    teacher_embeddings: Float[Array, "batch size"],
    keys: Float[Array, "keys size"],
    *,
    temperature: float | Array = 0.2,
) -> Float[Array, "batch"]:
    r"""S2-BNN's distillation without labels: which of many keys an image resembles.

    L_i = -sum_j p_t(j) log p_s(j),  p = softmax_j(cos(z_i, k_j) / T)

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

    That is each stage, or in its place its blocks, where both networks name them; `features` are left out.

    Raises:
      ValueError: if there is none.
    """
    names = [name for name in network.intermediates if name in teacher.intermediates and name != "features"]
    if not names:
        raise ValueError(
            f"`teacher` (with {', '.join(teacher.intermediates)}) shares no stage with the network, which has "
            f"{', '.join(network.intermediates)}; choose a teacher of the same family"
        )
    for name in (name for name in names if not any(other.startswith(f"{name}_") for other in names)):
        yield name, network.intermediates[name], teacher.intermediates[name]


def _over_stages(loss: Callable[[Array, Array], Array]) -> Callable[..., Array]:
    """The sum of `loss` over the stages that both networks have."""

    def total(network, teacher, **_):
        losses = []
        for name, own, wanted in shared_stages(network, teacher):
            try:
                losses.append(loss(own, wanted))
            except ValueError as error:
                raise ValueError(f"{name} of the network and of its teacher do not match: {error}") from None
        return sum(losses)

    return total


DISTILLATION_LOSSES: dict[str, Callable[..., Float[Array, "batch"]]] = {
    "distribution": lambda network, teacher, **_: distribution_loss(network.logits, teacher.logits),
    "knowledge": lambda network, teacher, *, temperature, **_: knowledge_distillation(
        network.logits, teacher.logits, temperature=temperature
    ),
    "attention": _over_stages(attention_matching),
    "features": _over_stages(feature_distillation),
    "standardized": _over_stages(standardized_distillation),
    "similarity": lambda network, teacher, *, temperature, keys: similarity_distillation(
        network.logits, teacher.logits, keys, temperature=temperature
    ),
}
"""(outputs, teacher's outputs, temperature=, keys=) -> a loss for each example; of stages the sum over them."""


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
        name: DISTILLATION_LOSSES[name](network, teacher, temperature=temperature, keys=keys).mean() for name in losses
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
