"""A run as one object: what it holds, what it can do, and that it is the same when it is loaded."""

import json
from dataclasses import replace

import jax
import numpy as np
import pytest
from flax import linen as nn
from small_sets import brightness_set, write_npz

import bnn_jax
from bnn_jax.data import normalize
from bnn_jax.errors import UsageError
from bnn_jax.outputs import network_logits
from bnn_jax.packed import load, save
from bnn_jax.training.config import Config, DataConfig, ModelConfig, OptimConfig
from bnn_jax.training.progress import silent

MODEL, SGD = ModelConfig("mnist_mlp", 4), OptimConfig("sgd", 0.1)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    data = DataConfig(write_npz(brightness_set(32, 10, 10), folder / "data.npz"))
    config = Config("test", 2, 8, loss="cross_entropy", model=MODEL, optim=SGD, data=data, scan_steps=2)
    return config, bnn_jax.train(config, folder / "mine", on_progress=silent)


def test_a_run_holds_its_network_and_its_history(trained):
    _, run = trained
    assert run.paths == {
        "config": run.workdir / "config.json",
        "data": run.workdir / "data.json",
        "metrics": run.workdir / "metrics.jsonl",
        "checkpoints": run.workdir / "checkpoints",
        "result": run.workdir / "result.json",
    }
    written = json.loads(run.paths["result"].read_text())
    assert run.result == {name: value for name, value in written.items() if name != "sha256"}
    assert run.history["epoch"] == [1, 2]
    for name in ("train_loss", "validation_accuracy"):
        assert run.history[name] == run.result["curve"][name]
    assert run.params is run.variables["params"] and "batch_stats" in run.variables
    best = 100 * run.result["test_accuracy_best"]
    assert repr(run) == f"Run({run.workdir}: mnist_mlp, sgd, test accuracy {best:.2f} %)"


def test_other_words_for_variables_and_splits_are_refused(trained):
    _, run = trained
    for ask in (run.load_variables, lambda which: run.evaluate(which=which), lambda which: run.freeze(which=which)):
        with pytest.raises(UsageError, match=r"^`which` \(='newest'\) must be best or last$"):
            ask("newest")
    with pytest.raises(UsageError, match=r"^`split` \(='val'\) must be one of train, validation, test$"):
        run.evaluate("val")


def test_a_loaded_run_is_the_one_that_was_trained(trained):
    config, run = trained
    loaded = bnn_jax.load_run(run.workdir)
    assert (loaded.config, loaded.result, loaded.history) == (run.config, run.result, run.history)
    assert run.config.model.kernel_quantizer is not None  # named, as in the folder
    for which in ("best", "last"):
        a, b = (jax.tree.leaves(one.load_variables(which)) for one in (run, loaded))
        assert all(np.array_equal(x, y) for x, y in zip(a, b, strict=True))
    assert repr(bnn_jax.train(config, run.workdir, on_progress=silent)) == repr(run)
    with pytest.raises(UsageError, match=r"holds no run: there is no .*config\.json"):
        bnn_jax.load_run(run.workdir.parent)


def test_a_run_evaluates_and_packs_itself(trained, tmp_path):
    _, run = trained
    test = run.dataset.test
    images = normalize(test.images, mean=run.dataset.mean, std=run.dataset.std)
    labels = np.asarray(network_logits(run.model, run.variables, images)).argmax(axis=1)
    accuracy = (labels == test.labels).mean()
    assert run.evaluate("test")["accuracy"] == pytest.approx(accuracy)
    assert run.result["test_accuracy_best"] == pytest.approx(accuracy)
    assert run.evaluate("validation", which="last")["accuracy"] == run.history["validation_accuracy"][-1]
    packed = run.freeze()
    assert packed.metadata["num_classes"] == 3
    np.testing.assert_array_equal(packed.predict(test.images), labels)
    np.testing.assert_array_equal(run.predict(test.images), labels)
    save(tmp_path / "mine.bnn.safetensors", packed)
    np.testing.assert_array_equal(load(tmp_path / "mine.bnn.safetensors").predict(test.images), labels)


def test_a_run_on_arrays_is_told_them_again(tmp_path, trained):
    whole = trained[1].dataset
    config = Config("test", 2, 8, loss="cross_entropy", model=MODEL, optim=SGD)
    data = {
        name: (getattr(whole, name).images, getattr(whole, name).labels) for name in ("train", "validation", "test")
    }
    run = bnn_jax.train(config, tmp_path, data=data, on_progress=silent)
    assert run.evaluate()["accuracy"] == pytest.approx(run.result["test_accuracy_best"])
    assert bnn_jax.load_run(tmp_path, data=data).evaluate() == run.evaluate()
    with pytest.raises(UsageError, match="data"):
        bnn_jax.load_run(tmp_path).evaluate()
    with pytest.raises(UsageError, match="data"):
        bnn_jax.load_run(tmp_path, data=data | {"test": data["validation"]}).evaluate()


@pytest.mark.full
def test_a_run_that_starts_from_another_evaluates_and_packs_itself_too(tmp_path, trained):
    config, first = trained
    config = replace(config, init_from=str(first.workdir), epochs=1)
    run = bnn_jax.train(config, tmp_path / "run", on_progress=silent)
    predicted = run.predict(run.dataset.test.images)
    np.testing.assert_array_equal(run.freeze().predict(run.dataset.test.images), predicted)
    assert bnn_jax.load_run(tmp_path / "run", config=config).evaluate() == run.evaluate()
    with pytest.raises(UsageError, match=r"`init_from` \(=.*run'\) lies in the run's own folder; give another"):
        bnn_jax.train(replace(config, init_from=str(run.workdir)), run.workdir, overwrite=True, on_progress=silent)


def test_a_network_that_no_name_finds_again_is_loaded_with_its_config(tmp_path, trained):
    class Own(nn.Module):
        num_classes: int = 3

        @nn.compact
        def __call__(self, x):
            return nn.Dense(self.num_classes)(x.reshape(len(x), -1))

    config = Config("test", 2, 8, loss="cross_entropy", model=ModelConfig(Own), optim=SGD)
    data = trained[1].dataset
    run = bnn_jax.train(config, tmp_path, data=data, on_progress=silent)
    loaded = bnn_jax.load_run(tmp_path, data=data, config=config)
    np.testing.assert_array_equal(loaded.predict(data.test.images), run.predict(data.test.images))
    with pytest.raises(UsageError, match="no import finds again; define it in a file"):
        bnn_jax.load_run(tmp_path, data=data).predict(data.test.images)
    with pytest.raises(UsageError, match=r"`batch_size` is 4 now, but .* holds a run with 8"):
        bnn_jax.load_run(tmp_path, data=data, config=replace(config, batch_size=4))


def test_progress_is_shown_by_default(tmp_path, trained, capsys):
    config, _ = trained
    run = bnn_jax.train(config, tmp_path)
    err = capsys.readouterr().err
    assert "\r" not in err and "\x1b" not in err
    lines = err.splitlines()
    assert lines[0] == "test sgd: 0/8 epoch 1/2  compiling ..."
    accuracies = [f"{100 * value:.2f} %" for value in run.history["validation_accuracy"]]
    best = f"best {accuracies[0]} (epoch 1)"
    assert lines[1].startswith(f"test sgd: 4/8 epoch 1/2  loss {run.history['train_loss'][0]:.3f}  ")
    assert f"validation {accuracies[0]}  {best}  " in lines[1] and lines[1].endswith(" left")
    assert len(lines) == 3 and f"validation {accuracies[1]}  best " in lines[2] and " images/s" in lines[2]
