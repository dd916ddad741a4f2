"""The losses against loops in float64, scikit-learn, and finite differences."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from sklearn.metrics import hinge_loss, log_loss

from bnn_jax.errors import UsageError
from bnn_jax.losses import (
    LOSSES,
    augmented_margins,
    check_loss,
    cross_entropy,
    label_smoothed_cross_entropy,
    make_loss,
    multiclass_hinge,
    smoothed_multiclass_hinge,
)

EXAMPLES, CLASSES = 64, 7
JITTED = {name: jax.jit(loss.apply) for name, loss in LOSSES.items()}


def random_batch(seed: int, scale: float = 2.0):
    rng = np.random.default_rng(seed)
    return (rng.normal(size=(EXAMPLES, CLASSES)) * scale).astype(np.float32), rng.integers(0, CLASSES, EXAMPLES)


def scalar_twin(name: str, logits, label: int) -> float:
    """One example, in Python floats."""
    logits = [float(f) for f in logits]
    peak = max(logits)
    exponentials = [np.exp(f - peak) for f in logits]
    if name == "cross_entropy":
        return peak + np.log(sum(exponentials)) - logits[label]
    if name == "label_smoothed_cross_entropy":
        return peak + np.log(sum(exponentials)) - 0.9 * logits[label] - 0.1 * sum(logits) / len(logits)
    pieces = [f - logits[label] + (c != label) for c, f in enumerate(logits)]
    hinge = max(pieces)
    smoothed = sum(e / sum(exponentials) * piece for e, piece in zip(exponentials, pieces))
    return hinge if name == "multiclass_hinge" or smoothed < 0 else smoothed


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("scale", [1e-3, 2.0, 50.0])
def test_the_value_is_that_of_the_scalar_twin(name, scale):
    logits, labels = random_batch(0, scale)
    expected = [scalar_twin(name, *example) for example in zip(logits, labels)]
    actual = JITTED[name](logits, labels)
    assert actual.shape == (EXAMPLES,)
    np.testing.assert_allclose(actual, expected, rtol=2e-6, atol=2e-6 * max(scale, 1))


@pytest.mark.parametrize("name", LOSSES)
def test_the_value_is_right_on_the_way_from_error_to_margin(name):
    logits, labels = np.zeros((EXAMPLES, CLASSES), np.float32), np.zeros(EXAMPLES, int)
    logits[:, 0], logits[:, 1] = np.linspace(-2, 3, EXAMPLES), 0.5  # the sum of xi b changes its sign near f_y = 1.2
    expected = [scalar_twin(name, *example) for example in zip(logits, labels)]
    np.testing.assert_allclose(JITTED[name](logits, labels), expected, rtol=2e-6, atol=2e-6)


def test_margins_are_zero_at_the_label_and_one_more_elsewhere():
    logits, labels = random_batch(1)
    margins = jax.jit(augmented_margins)(logits, labels)
    rows = np.arange(EXAMPLES)
    assert not np.any(np.asarray(margins)[rows, labels])
    others = logits.astype(np.float64) - logits[rows, labels, None] + 1
    others[rows, labels] = 0
    np.testing.assert_allclose(margins, others, atol=2e-6)


@pytest.mark.parametrize("seed", range(5))
def test_means_are_those_of_scikit_learn(seed):
    logits, labels = random_batch(seed)
    labels[:CLASSES] = np.arange(CLASSES)  # scikit-learn takes the classes from the labels
    probabilities = scipy.special.softmax(logits.astype(np.float64), axis=1)
    assert float(np.mean(JITTED["multiclass_hinge"](logits, labels))) == pytest.approx(
        hinge_loss(labels, logits), rel=1e-6
    )
    assert float(np.mean(JITTED["cross_entropy"](logits, labels))) == pytest.approx(
        log_loss(labels, probabilities), rel=1e-5
    )


@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    # Quarters, so that margins of exactly 1 come up and float32 represents every difference.
    logits=hnp.arrays(np.int64, (EXAMPLES, 3), elements=st.integers(-12, 12)),
    labels=hnp.arrays(np.int64, EXAMPLES, elements=st.integers(0, 2)),
)
def test_the_hinge_is_zero_exactly_where_the_margin_is_one(logits, labels):
    logits = (logits / 4).astype(np.float32)
    rows = np.arange(EXAMPLES)
    rivals = logits.copy()
    rivals[rows, labels] = -np.inf
    separated = logits[rows, labels] - rivals.max(axis=1) >= 1
    loss = np.asarray(JITTED["multiclass_hinge"](logits, labels))
    np.testing.assert_array_equal(loss == 0, separated)
    assert loss.min() >= 0
    smoothed = np.asarray(JITTED["smoothed_multiclass_hinge"](logits, labels))
    assert smoothed.min() >= 0
    assert np.all(smoothed <= loss + 1e-6)


# ---- derivatives


def gradient_of(name, logits, labels):
    return np.asarray(jax.jit(jax.grad(lambda f: LOSSES[name].apply(f, labels).sum()))(logits))


@pytest.mark.parametrize("name", ["cross_entropy", "label_smoothed_cross_entropy", "multiclass_hinge"])
def test_the_gradient_is_the_finite_difference(name):
    logits, labels = random_batch(2)
    ranked = np.sort(np.asarray(jax.jit(augmented_margins)(logits, labels)), axis=1)
    assert (ranked[:, -1] - ranked[:, -2]).min() > 1e-5  # away from the kinks
    gradient = gradient_of(name, logits, labels)
    step = 1e-6
    for i in range(0, EXAMPLES, 7):
        for c in range(CLASSES):
            shifted = [logits[i].astype(np.float64) + sign * step * np.eye(CLASSES)[c] for sign in (1, -1)]
            up, down = (scalar_twin(name, f, labels[i]) for f in shifted)
            assert gradient[i, c] == pytest.approx((up - down) / (2 * step), abs=1e-6)


def test_the_gradient_of_the_hinge_is_one_vertex_also_at_ties():
    logits = np.array([[1.0, 1.0, 0.0], [2.0, 1.0, 1.0], [5.0, 0.0, 0.0], [0.0, 0.0, 0.0]], np.float32)
    labels = np.array([2, 0, 0, 1])
    gradient = gradient_of("multiclass_hinge", logits, labels)
    for row, label in zip(gradient, labels):
        vertices = [np.eye(3)[c] - np.eye(3)[label] for c in range(3)]
        assert any(np.array_equal(row, vertex) for vertex in vertices)
    assert np.any(gradient[0])
    assert not np.any(gradient[2])


def test_the_gradient_of_the_smoothed_hinge_holds_the_softmax_constant():
    logits, labels = random_batch(3, scale=1.0)
    gradient = gradient_of("smoothed_multiclass_hinge", logits, labels)
    double = logits.astype(np.float64)
    xi = np.exp(double) / np.exp(double).sum(axis=1, keepdims=True)
    pieces = double - double[np.arange(EXAMPLES), labels, None] + 1
    pieces[np.arange(EXAMPLES), labels] = 0
    smooth = (xi * pieces).sum(axis=1) >= 0
    assert 0.5 < smooth.mean() < 1
    expected = xi - np.eye(CLASSES)[labels]
    np.testing.assert_allclose(gradient[smooth], expected[smooth], atol=1e-6)
    vertices = np.eye(CLASSES)[pieces.argmax(axis=1)] - np.eye(CLASSES)[labels]
    np.testing.assert_allclose(gradient[~smooth], vertices[~smooth], atol=1e-6)


def test_where_smoothing_would_lower_the_dual_it_falls_back_to_the_vertex():
    # xi.b < 0 with a rival inside the margin: far classes outweigh it.
    logits = np.array([[3.0, 2.9] + [0.0] * 40, [4.0, 0.0] + [1.0] * 40], np.float32)
    labels = np.array([0, 0])
    double = logits.astype(np.float64)
    xi = np.exp(double) / np.exp(double).sum(axis=1, keepdims=True)
    pieces = double - double[:, :1] + 1
    pieces[:, 0] = 0
    assert ((xi * pieces).sum(axis=1) < 0).all()
    np.testing.assert_allclose(JITTED["smoothed_multiclass_hinge"](logits, labels), [0.9, 0.0], atol=1e-6)
    gradient = gradient_of("smoothed_multiclass_hinge", logits, labels)
    np.testing.assert_array_equal(gradient[0, :3], [-1, 1, 0])
    assert not np.any(gradient[1])


# ---- laws of the table


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_the_dtype_is_kept(name, dtype):
    logits, labels = random_batch(4)
    logits = jnp.asarray(logits, dtype)
    loss, gradient = JITTED[name](logits, labels), gradient_of(name, logits, labels)
    assert loss.dtype == gradient.dtype == logits.dtype
    expected = np.mean([scalar_twin(name, f, y) for f, y in zip(np.asarray(logits, np.float64), labels)])
    mean = np.asarray(loss, np.float64).mean()
    assert mean == pytest.approx(expected, rel=4 * float(jnp.finfo(dtype).eps))


@pytest.mark.parametrize("name", LOSSES)
def test_batches_are_independent_examples_under_vmap(name):
    logits, labels = random_batch(5)
    together = JITTED[name](logits, labels)
    each = jax.jit(jax.vmap(lambda f, y: LOSSES[name].apply(f[None], y[None])[0]))(logits, labels)
    np.testing.assert_allclose(each, together, rtol=2e-6)


def test_label_smoothing_is_the_mean_over_labels_and_0_is_none():
    """(1 - s) of the label's cross-entropy and s of the mean over all labels'."""
    logits, labels = random_batch(7)
    of_label = lambda y: np.asarray(cross_entropy(logits, np.full(EXAMPLES, y)), np.float64)
    mean = np.mean([of_label(y) for y in range(CLASSES)], axis=0)
    plain = np.asarray(cross_entropy(logits, labels), np.float64)
    found = label_smoothed_cross_entropy(logits, labels, smoothing=0.3)
    np.testing.assert_allclose(found, 0.7 * plain + 0.3 * mean, rtol=1e-5)
    np.testing.assert_allclose(label_smoothed_cross_entropy(logits, labels, smoothing=0.0), plain, rtol=1e-6)
    with pytest.raises(ValueError, match=r"`smoothing` \(=1\.0\) must be in \[0, 1\); 0\.1 is usual"):
        label_smoothed_cross_entropy(logits, labels, smoothing=1.0)


@pytest.mark.parametrize("name", [name for name in LOSSES if "label" not in name])
def test_large_logits_stay_finite(name):
    logits = np.array([[1e30, -1e30, 0.0], [-1e30, 1e30, 0.0]], np.float32)
    labels = np.array([0, 0])
    loss, gradient = JITTED[name](logits, labels), gradient_of(name, logits, labels)
    np.testing.assert_allclose(loss, [0.0, 2e30], rtol=1e-6)
    np.testing.assert_allclose(gradient, [[0, 0, 0], [-1, 1, 0]], atol=1e-6)


@pytest.mark.parametrize("name", [name for name, loss in LOSSES.items() if loss.piecewise_linear])
def test_value_and_gradient_of_a_piecewise_linear_loss_are_a_piece_of_the_hinge(name):
    """Deep Frank-Wolfe reads (gradient, value) as the piece value + gradient.(f' - f): a lower bound of the hinge."""
    logits, labels = random_batch(6)
    value, gradient = np.asarray(JITTED[name](logits, labels), np.float64), gradient_of(name, logits, labels)
    for seed in range(5):
        shift = np.random.default_rng(seed).normal(size=logits.shape)
        moved = [scalar_twin("multiclass_hinge", f, y) for f, y in zip(logits + shift, labels)]
        assert np.all(value + (gradient * shift).sum(axis=1) <= np.array(moved) + 1e-5)


def test_the_temperature_of_the_smoothed_hinge_divides_the_logits_of_the_softmax_alone():
    logits, labels = random_batch(8, scale=1.0)
    xi = scipy.special.softmax(logits.astype(np.float64) / 3.0, axis=1)
    margins = np.asarray(augmented_margins(logits, labels), np.float64)
    expected = np.where((xi * margins).sum(axis=1) < 0, margins.max(axis=1), (xi * margins).sum(axis=1))
    found = smoothed_multiclass_hinge(logits, labels, temperature=3.0)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(
        smoothed_multiclass_hinge(logits, labels, temperature=1.0), smoothed_multiclass_hinge(logits, labels)
    )


def test_a_loss_is_made_from_a_name_a_record_or_a_function():
    logits, labels = random_batch(9)
    smoothed = make_loss("label_smoothed_cross_entropy", smoothing=0.3)
    expected = label_smoothed_cross_entropy(logits, labels, smoothing=0.3)
    for found in (smoothed, make_loss(label_smoothed_cross_entropy, smoothing=0.3), make_loss(smoothed)):
        np.testing.assert_array_equal(found.apply(logits, labels), expected)
        np.testing.assert_array_equal(found.monitored(logits, labels), expected)
    hinge = make_loss(LOSSES["smoothed_multiclass_hinge"], temperature=2.0)
    assert hinge.piecewise_linear
    np.testing.assert_array_equal(hinge.monitored(logits, labels), multiclass_hinge(logits, labels))


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("hinge", {}, r"`loss` \(='hinge'\) is not known; did you mean 'multiclass_hinge'\?"),
        ("label_smoothed_cross_entropy", {"smooth": 0.1}, r"`options` \(='smooth'\) .* did you mean 'smoothing'\?"),
        ("label_smoothed_cross_entropy", {"smoothing": 1.0}, r"`smoothing` \(=1\.0\) must be in \[0, 1\)"),
        ("smoothed_multiclass_hinge", {"temperature": -1.0}, r"`temperature` \(=-1\.0\) must be positive; 1 is usual"),
        ("cross_entropy", {"temperature": 1.0}, r"`options` \(='temperature'\) is not known; there is no option"),
    ],
)
def test_what_no_loss_can_be_made_of_is_refused(name, options, message):
    with pytest.raises(ValueError, match=message):
        make_loss(name, **options)


@pytest.mark.parametrize(
    ("loss", "words"),
    [
        (
            lambda logits, labels: cross_entropy(logits, labels).mean(),
            r"shape \(6,\) for 6; it returns shape \(\): leave",
        ),
        (
            lambda logits, labels: cross_entropy(logits, labels)[:, None],
            r"shape \(6,\) for 6; it returns shape \(6, 1\)",
        ),
        (lambda logits, labels: logits, r"must return one loss for each example, shape \(6,\) for 6; it returns shape"),
        (lambda logits, labels: {"loss": logits}, r"it returns dict: leave means and sums to the training step"),
        (lambda logits, labels: logits @ logits, r"^`loss` \(=mine\) cannot be computed: dot"),
    ],
)
def test_a_loss_that_is_not_of_each_example_is_refused(loss, words):
    with pytest.raises(UsageError, match=words):
        check_loss(make_loss(loss), 5, named="mine")
    with pytest.raises(UsageError, match=words):
        check_loss(make_loss("cross_entropy")._replace(monitored=loss), 5, named="mine")


def test_options_of_ones_own_loss_may_be_of_each_class():
    weighted = make_loss(
        lambda logits, labels, *, weights=(): jnp.take(weights, labels) * cross_entropy(logits, labels)
    )
    weighted = make_loss(weighted.apply, weights=jnp.ones(5))
    check_loss(weighted, 5, named="weighted")
