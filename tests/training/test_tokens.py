"""Runs on texts: losses, accuracy and perplexity are those of tokens; the packed network has the trained one's."""

import json
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from networks import apply
from scipy.special import log_softmax

from bnn_jax.cli.evaluate import main as evaluate_main
from bnn_jax.data import in_batches, load_dataset
from bnn_jax.errors import UsageError
from bnn_jax.packed import PackedModel, verify
from bnn_jax.packed.runs import freeze_run
from bnn_jax.training.config import Config, DataConfig, DistillationConfig, ModelConfig, OptimConfig
from bnn_jax.training.epoch import evaluate
from bnn_jax.training.experiment import ImageInfo, make_experiment
from bnn_jax.training.loop import train
from bnn_jax.training.step import init_state, train_step
from bnn_jax.training.validation import validate, with_published_quantizers

MODEL = ModelConfig("bitnet_lm", width=8, options={"depth": 1})
ADAM = OptimConfig("adam", learning_rate=0.01, latent_box=None)


def numbers_of(model, variables, images, labels):
    """Loss, perplexity and accuracy in float64, token by token, of the labels from 0 on."""
    logits = np.asarray(apply(model, variables, jnp.asarray(images, jnp.float32))[0], np.float64)
    rows, own = logits.reshape(-1, logits.shape[-1])[labels.ravel() >= 0], labels[labels >= 0]
    loss = -log_softmax(rows, axis=1)[np.arange(len(own)), own].mean()
    return {"loss": loss, "perplexity": np.exp(loss), "accuracy": (rows.argmax(1) == own).mean()}


def test_an_evaluation_and_a_step_are_means_over_tokens():
    config = validate(Config("test", epochs=1, batch_size=3, loss="cross_entropy", model=MODEL, optim=ADAM))
    experiment = make_experiment(config, ImageInfo((4, 1, 1), 7, (0.0,), (1.0,)), total_steps=2)
    rng = np.random.default_rng(0)
    images, labels = rng.integers(0, 7, (3, 4, 1, 1)).astype(np.uint8), rng.integers(0, 7, (3, 4)).astype(np.int32)
    state = jax.jit(partial(init_state, experiment))(jnp.uint32(0))
    variables = {"params": state.params}
    expected = numbers_of(experiment.model, variables, images, labels)
    _, metrics = jax.jit(partial(train_step, experiment))(state, jnp.asarray(images), jnp.asarray(labels))
    np.testing.assert_allclose(
        [metrics["loss"], metrics["accuracy"]], [expected["loss"], expected["accuracy"]], rtol=1e-5
    )
    labels[1, 2], labels[2] = -1, -1
    found = jax.jit(partial(evaluate, experiment))(state.params, {}, jnp.asarray(images), jnp.asarray(labels))
    assert found.pop("examples") == 7
    expected = numbers_of(experiment.model, variables, images, labels)
    assert found.keys() == expected.keys()
    np.testing.assert_allclose([found[name] for name in expected], list(expected.values()), rtol=1e-5)


def test_a_large_loss_is_no_infinite_perplexity():
    """exp(100) is beyond float32: the loss says how far."""
    config = validate(Config("test", epochs=1, batch_size=3, loss="cross_entropy", model=MODEL, optim=ADAM))
    experiment = make_experiment(config, ImageInfo((4, 1, 1), 7, (0.0,), (1.0,)), total_steps=2)
    experiment = experiment._replace(model=Certain())
    found = evaluate(experiment, {}, {}, jnp.zeros((3, 4, 1, 1), jnp.uint8), jnp.ones((3, 4), jnp.int32))
    assert found["loss"] == 100 and found["perplexity"] == np.finfo(np.float32).max and found["accuracy"] == 0


class Certain(nn.Module):
    """Sure of token 0, whose logit is 100 above the others'."""

    def __call__(self, x):
        return jnp.zeros((*x.shape[:2], 7)).at[..., 0].set(100.0)


def taught_by_itself(taught):
    """A network of texts, its state, and that of another seed which teaches it."""
    model = with_published_quantizers(MODEL)
    config = Config("test", epochs=1, batch_size=3, loss="cross_entropy", model=model, optim=ADAM, distillation=taught)
    experiment = make_experiment(config, ImageInfo((4, 1, 1), 7, (0.0,), (1.0,)), total_steps=2, teacher=model)
    return experiment, *(jax.jit(partial(init_state, experiment))(jnp.uint32(seed)) for seed in (0, 1))


@pytest.mark.full
def test_the_queue_of_a_teacher_of_texts_holds_tokens():
    taught = DistillationConfig(losses={"similarity": 1.0}, queue_size=20)
    experiment, state, teacher = taught_by_itself(taught)
    images, labels = jnp.ones((3, 4, 1, 1), jnp.uint8), jnp.ones((3, 4), jnp.int32)
    after, _ = jax.jit(partial(train_step, experiment))(state, images, labels, {"params": teacher.params})
    logits = apply(experiment.model, {"params": teacher.params}, images.astype(jnp.float32))[0].reshape(12, 7)
    unit = logits / jnp.linalg.norm(logits, axis=1, keepdims=True)
    np.testing.assert_allclose(after.keys, jnp.concatenate([unit, state.keys[:8]]), rtol=1e-4, atol=1e-5)


@pytest.mark.full
def test_a_teacher_of_texts_teaches_each_token():
    """By the divergence of its predictions, in float64: the mean over all tokens."""
    taught = DistillationConfig(losses={"knowledge": 1.0}, label_weight=0.0)
    experiment, state, teacher = taught_by_itself(taught)
    rng = np.random.default_rng(0)
    images, labels = rng.integers(0, 7, (3, 4, 1, 1)).astype(np.uint8), rng.integers(0, 7, (3, 4)).astype(np.int32)
    arguments = (jnp.asarray(images), jnp.asarray(labels), {"params": teacher.params})
    _, metrics = jax.jit(partial(train_step, experiment))(state, *arguments)
    own, wanted = (
        log_softmax(np.asarray(apply(experiment.model, {"params": s.params}, jnp.asarray(images, jnp.float32))[0]), -1)
        for s in (state, teacher)
    )
    divergence = (np.exp(wanted) * (wanted - own)).sum(-1).mean()
    np.testing.assert_allclose(metrics["distillation_knowledge"], divergence, rtol=1e-4)


@pytest.mark.parametrize("argument", ["crop_padding", "flip", "mixup_alpha"])
def test_texts_are_not_augmented(argument):
    value = argument == "flip" or 1
    data = DataConfig("text", **{argument: value})
    with pytest.raises(
        UsageError, match=rf"`data.{argument}` \(={value}\) is for images, and text is a text; leave it out"
    ):
        validate(Config("test", epochs=1, batch_size=4, data=data, model=MODEL, optim=ADAM))


@pytest.mark.full
@pytest.mark.parametrize("optim", [ADAM, OptimConfig("dfw", learning_rate=1.0, inner_steps=2)], ids=lambda o: o.name)
def test_a_run_on_a_text_and_its_packed_network(optim, tmp_path, monkeypatch, capsys):
    text = tmp_path / "text.txt"
    text.write_bytes(b"the quick brown fox jumps over the lazy dog. " * 40)
    loss = "cross_entropy" if optim.name == "adam" else "smoothed_multiclass_hinge"
    data = DataConfig(str(text), tokens=16)
    config = Config("text", epochs=2, batch_size=8, loss=loss, data=data, model=MODEL, optim=optim)
    result = train(config, tmp_path / "run")
    run = freeze_run(tmp_path / "run", which="last")
    split = load_dataset(str(text), tokens=16).test
    expected = numbers_of(run.model, run.variables, split.images, split.labels)
    np.testing.assert_allclose(result["test_accuracy_last"], expected["accuracy"], rtol=1e-5)
    np.testing.assert_allclose(result["test_perplexity_last"], expected["perplexity"], rtol=1e-5)
    records = map(json.loads, (tmp_path / "run" / "metrics.jsonl").read_text().splitlines())
    assert all(r["validation_perplexity"] > 1 for r in records if r["kind"] == "evaluation")
    report = verify(run.model, run.variables, run.packed, [jnp.asarray(split.images, jnp.float32)])
    assert report.passed and report.largest_logit_difference == 0
    described = {"image_shape": run.dataset.image_shape, "mean": run.dataset.mean, "std": run.dataset.std}
    packed = PackedModel(run.model, run.packed, described)
    np.testing.assert_allclose(packed.perplexity(in_batches(split, 5)), result["test_perplexity_last"], rtol=1e-6)
    assert packed.accuracy(in_batches(split, 5)) == (pytest.approx(result["test_accuracy_last"]), split.labels.size)
    monkeypatch.setattr("sys.argv", ["evaluate", str(tmp_path / "run"), "--which", "last"])
    evaluate_main()
    assert f"perplexity {result['test_perplexity_last']:.4f}" in capsys.readouterr().out
