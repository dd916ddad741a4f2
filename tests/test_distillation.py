"""The losses of a teacher against twins in float64, closed-form gradients, and the laws they are chosen for."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bnn_jax.distillation import (
    DISTILLATION_LOSSES,
    Outputs,
    attention_matching,
    attention_mse,
    distilled,
    distribution_loss,
    embedding_distillation,
    enqueue,
    feature_distillation,
    initial_keys,
    knowledge_distillation,
    shared_stages,
    similarity_distillation,
    standardized_distillation,
)

EXAMPLES, CLASSES = 6, 5


def normal(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def double(*arrays):
    return [np.asarray(a, np.float64) for a in arrays]


# ---- twins: an example at a time, in float64


def distribution_twin(own, wanted):
    p_s, p_t = softmax(own), softmax(wanted)
    return -sum(p_t[c] * np.log(p_s[c]) for c in range(CLASSES))


def knowledge_twin(own, wanted, temperature):
    p_s, p_t = softmax(own / temperature), softmax(wanted / temperature)
    return temperature**2 * sum(p_t[c] * np.log(p_t[c] / p_s[c]) for c in range(CLASSES))


def attention_twin(own, wanted):
    def q(a):
        q = np.array([[sum(v**2 for v in pixel) for pixel in row] for row in a]).ravel()
        return q / np.sqrt((q**2).sum())

    return np.sqrt(((q(own) - q(wanted)) ** 2).sum())


def attention_mse_twin(own, wanted):
    """AttentionMatchingLossLayer of larq zoo, of one example and one block."""

    def q(a):
        q = np.array([[np.mean([v**2 for v in pixel]) for pixel in row] for row in a]).ravel()
        return q / q.max()

    return ((q(own) - q(wanted)) ** 2).mean()


def feature_twin(own, wanted):
    cosine = (own * wanted).sum() / np.sqrt((own**2).sum() * (wanted**2).sum())
    return 2 - 2 * cosine


def standardized_twin(own, wanted):
    own, wanted = ((a - a.mean()) / a.std() for a in (own, wanted))
    return ((own - wanted) ** 2).mean()


def embedding_twin(own, wanted, temperature):
    """S2-BNN's main_moco.py, builder.py and kd_loss.py, of one example."""
    p_s, p_t = (softmax(z / np.sqrt((z**2).sum()) / temperature) for z in (own, wanted))
    return -(p_t * np.log(p_s)).sum()


def similarity_twin(own, wanted, keys, temperature):
    keys = keys / np.linalg.norm(keys, axis=1, keepdims=True)
    p_s, p_t = (softmax(keys @ (z / np.linalg.norm(z)) / temperature) for z in (own, wanted))
    return -(p_t * np.log(p_s)).sum()


KEYS = normal(9, 11, CLASSES)
MAPS = normal(2, EXAMPLES, 4, 3, 8), normal(3, EXAMPLES, 4, 3, 8)
LOGITS = 2 * normal(0, EXAMPLES, CLASSES), 2 * normal(1, EXAMPLES, CLASSES)
CASES = {
    "distribution": (distribution_loss, distribution_twin, LOGITS),
    "knowledge, T = 1": (knowledge_distillation, lambda s, t: knowledge_twin(s, t, 1.0), LOGITS),
    "knowledge, T = 4": (
        lambda s, t: knowledge_distillation(s, t, temperature=4.0),
        lambda s, t: knowledge_twin(s, t, 4.0),
        LOGITS,
    ),
    "attention": (attention_matching, attention_twin, MAPS),
    "attention, fewer channels": (attention_matching, attention_twin, (MAPS[0][..., :2], MAPS[1])),
    "attention_mse": (attention_mse, attention_mse_twin, MAPS),
    "attention_mse, fewer channels": (attention_mse, attention_mse_twin, (MAPS[0][..., :2], MAPS[1])),
    "features": (feature_distillation, feature_twin, MAPS),
    "standardized": (standardized_distillation, standardized_twin, MAPS),
    "embedding": (embedding_distillation, lambda s, t: embedding_twin(s, t, 0.2), LOGITS),
    "similarity": (
        lambda s, t: similarity_distillation(s, t, KEYS),
        lambda s, t: similarity_twin(s, t, KEYS.astype(np.float64), 0.2),
        LOGITS,
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_value_and_gradient_are_those_of_the_twin(name):
    loss, twin, (own, wanted) = CASES[name]
    found, gradient = jax.value_and_grad(lambda s: loss(s, wanted).sum())(own)
    exact = double(own, wanted)
    values = [twin(s, t) for s, t in zip(*exact)]
    assert float(found) == pytest.approx(sum(values), rel=1e-5)
    np.testing.assert_allclose(loss(own, wanted), values, rtol=1e-4)
    for seed in range(3):  # the derivative along random directions, by central differences in float64
        direction = np.random.default_rng(seed).normal(size=own.shape)
        up, down = (sum(twin(s, t) for s, t in zip(exact[0] + h * direction, exact[1])) / 2e-6 for h in (1e-6, -1e-6))
        assert (np.asarray(gradient, np.float64) * direction).sum() == pytest.approx(up - down, rel=1e-3, abs=1e-4)


def test_the_gradient_of_the_distribution_loss_is_the_difference_of_probabilities():
    own, wanted = LOGITS
    gradient = jax.grad(lambda s: distribution_loss(s, wanted).mean())(own)
    expected = (softmax(double(own)[0]) - softmax(double(wanted)[0])) / EXAMPLES
    np.testing.assert_allclose(gradient, expected, atol=1e-7)
    softened = jax.grad(lambda s: knowledge_distillation(s, wanted, temperature=3.0).mean())(own)
    expected = 3 * (softmax(double(own)[0] / 3) - softmax(double(wanted)[0] / 3)) / EXAMPLES
    np.testing.assert_allclose(softened, expected, atol=1e-6)


@pytest.mark.parametrize("name", ["knowledge, T = 4", "attention", "attention_mse", "features", "standardized"])
def test_equal_outputs_cost_nothing_and_pull_nowhere(name):
    loss, _, (_, wanted) = CASES[name]
    wanted = jnp.asarray(wanted)
    found, gradient = jax.value_and_grad(lambda s: loss(s, wanted).sum())(wanted)
    assert abs(float(found)) < 1e-6
    np.testing.assert_allclose(gradient, 0, atol=1e-6)


@pytest.mark.parametrize("name", ["attention", "attention_mse", "features", "standardized"])
def test_the_size_of_the_activations_does_not_matter(name):
    loss, _, (own, wanted) = CASES[name]
    expected = loss(own, wanted)
    np.testing.assert_allclose(loss(7.5 * own, wanted), expected, rtol=1e-5)
    np.testing.assert_allclose(loss(own, 0.01 * wanted), expected, rtol=1e-4)
    if name == "standardized":
        np.testing.assert_allclose(loss(own + 3.0, wanted), expected, rtol=1e-4)
    zero = np.zeros_like(own)  # as a network of dead filters: finite, also its gradient
    assert np.isfinite(jax.grad(lambda s: loss(s, wanted).sum())(zero)).all()


def test_attention_does_not_see_signs_or_the_order_of_channels():
    own, wanted = MAPS
    expected = attention_matching(own, wanted)
    np.testing.assert_allclose(attention_matching(-own[..., ::-1], wanted), expected, rtol=1e-5)
    np.testing.assert_allclose(attention_matching(np.concatenate([own, own], -1), wanted), expected, rtol=1e-5)


def test_similarity_is_least_for_the_teachers_own_direction():
    own, wanted = LOGITS
    least = np.asarray(similarity_distillation(5 * wanted, wanted, KEYS))
    assert (least < np.asarray(similarity_distillation(own, wanted, KEYS))).all()
    np.testing.assert_allclose(jax.grad(lambda s: similarity_distillation(s, wanted, KEYS).sum())(wanted), 0, atol=1e-5)


def test_the_queue_forgets_the_oldest_keys_first():
    keys = np.asarray(initial_keys(jax.random.key(0), count=5, size=3))
    np.testing.assert_allclose(np.linalg.norm(keys, axis=1), 1, rtol=1e-6)
    assert len(np.unique(keys)) == 15
    batch = normal(4, 2, 3)
    after = np.asarray(enqueue(keys, batch))
    np.testing.assert_allclose(after[:2], batch / np.linalg.norm(batch, axis=1, keepdims=True), rtol=1e-6)
    np.testing.assert_array_equal(after[2:], keys[:3])
    assert enqueue(keys, normal(4, 8, 3)).shape == (5, 3)


# ---- whole networks


def outputs(logits, maps, **more):
    return Outputs(jnp.asarray(logits), {"stage1": jnp.asarray(maps), "features": jnp.asarray(logits), **more})


OWN, WANTED = outputs(LOGITS[0], MAPS[0]), outputs(LOGITS[1], MAPS[1])


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("distribution", lambda: distribution_loss(*LOGITS)),
        ("knowledge", lambda: knowledge_distillation(*LOGITS, temperature=0.5)),
        ("attention", lambda: attention_matching(*MAPS)),
        ("attention_mse", lambda: attention_mse(*MAPS)),
        ("features", lambda: feature_distillation(*MAPS)),
        ("standardized", lambda: standardized_distillation(*MAPS)),
        ("embedding", lambda: embedding_distillation(*LOGITS, temperature=0.5)),
        ("similarity", lambda: similarity_distillation(*LOGITS, KEYS, temperature=0.5)),
    ],
)
def test_the_table_applies_each_loss_to_the_outputs_it_is_for(name, expected):
    assert set(DISTILLATION_LOSSES) == {
        "distribution",
        "knowledge",
        "attention",
        "attention_mse",
        "features",
        "standardized",
        "embedding",
        "similarity",
    }
    found = DISTILLATION_LOSSES[name](OWN, WANTED, temperature=0.5, keys=KEYS)
    assert found.shape == (EXAMPLES,)
    np.testing.assert_allclose(found, expected(), rtol=1e-5)


def test_stages_are_summed_and_blocks_stand_for_their_stage():
    first, second = normal(5, EXAMPLES, 2, 2, 8), normal(6, EXAMPLES, 2, 2, 8)
    own, wanted = outputs(LOGITS[0], MAPS[0], stage2=first), outputs(LOGITS[1], MAPS[1], stage2=second)
    total = DISTILLATION_LOSSES["attention"](own, wanted)
    parts = attention_matching(*MAPS) + attention_matching(first, second)
    np.testing.assert_allclose(total, parts, rtol=1e-6)
    mean = DISTILLATION_LOSSES["attention_mse"](own, wanted)
    np.testing.assert_allclose(mean, (attention_mse(*MAPS) + attention_mse(first, second)) / 2, rtol=1e-6)
    blocks = {"stage1_block1": MAPS[0], "stage1_block2": MAPS[1]}
    names = [name for name, _, _ in shared_stages(outputs(LOGITS[0], MAPS[0], **blocks), outputs(*LOGITS, **blocks))]
    assert names == ["stage1_block1", "stage1_block2"]
    names = [name for name, _, _ in shared_stages(outputs(LOGITS[0], MAPS[0], **blocks), WANTED)]
    assert names == ["stage1"]
    deeper = blocks | {"stage1_block3": MAPS[0]}
    names = [name for name, _, _ in shared_stages(outputs(LOGITS[0], MAPS[0], **blocks), outputs(*LOGITS, **deeper))]
    assert names == ["stage1"]  # whose ends both have


@pytest.mark.parametrize("value", [0.1, 0.3, 0.7, 1.0])
@pytest.mark.parametrize("size", [7, 784])
def test_constant_activations_are_zero_when_they_are_standardized(value, size):
    """Their mean rounds to another number, whose difference would be blown up."""
    constant, varied = jnp.full((1, size), value), normal(0, 1, size)
    zero = jnp.zeros((1, size))
    assert standardized_distillation(constant, zero).tolist() == [0.0]
    assert standardized_distillation(constant, varied).tolist() == pytest.approx([1.0], rel=1e-5)
    gradient = jax.grad(lambda a: standardized_distillation(a, varied).sum())(constant)
    assert (gradient == 0).all()


@pytest.mark.usefixtures("unchecked")
def test_networks_that_do_not_fit_are_refused():
    with pytest.raises(
        ValueError, match=r"`teacher` \(with conv1\) shares no stage with the network, which has stage1"
    ):
        DISTILLATION_LOSSES["features"](OWN, Outputs(OWN.logits, {"conv1": MAPS[0]}))
    with pytest.raises(ValueError, match=r"stage1 of the network and of its teacher do not match: `teacher_maps` of"):
        DISTILLATION_LOSSES["attention"](OWN, outputs(LOGITS[1], MAPS[1][:, :2]))
    with pytest.raises(ValueError, match=r"stage1 .* the teacher's shape \(6, 4, 3, 2\) must be the network's"):
        DISTILLATION_LOSSES["standardized"](OWN, outputs(LOGITS[1], MAPS[1][..., :2]))


def test_the_objective_weighs_its_parts():
    losses = {"attention": 30.0, "knowledge": 3.0}
    objective, parts = distilled(jnp.float32(2.0), OWN, WANTED, losses=losses, label_weight=0.5, temperature=2.0)
    attention, knowledge = (
        np.mean([t(s, w) for s, w in zip(*double(*pair))])
        for t, pair in ((attention_twin, MAPS), (lambda s, w: knowledge_twin(s, w, 2.0), LOGITS))
    )
    assert {name: float(part) for name, part in parts.items()} == pytest.approx(
        {"attention": attention, "knowledge": knowledge}, rel=1e-5
    )
    assert float(objective) == pytest.approx(1.0 + 30 * attention + 3 * knowledge, rel=1e-5)
