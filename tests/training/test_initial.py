"""Runs that start from the weights of a file or of another run, which their config names."""

from dataclasses import replace

import chex
import flax.linen as nn
import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from small_sets import brightness_set

import bnn_jax
from bnn_jax.errors import UsageError
from bnn_jax.layers import BinaryDense
from bnn_jax.packed import latent_variables, load, save
from bnn_jax.stages.stage import Stage, run_stages
from bnn_jax.stages.teachers import load_network
from bnn_jax.sweeps.engine import Run, run_all
from bnn_jax.training.config import Config, ModelConfig, OptimConfig
from bnn_jax.training.initial import start_of, variables_of_run, with_start
from bnn_jax.training.input_pipeline import with_data
from bnn_jax.training.loop import train, train_together
from bnn_jax.training.programs import initial_state, programs_of
from bnn_jax.training.run_folder import read_config
from bnn_jax.training.validation import validate

SGD = OptimConfig("sgd", 0.1)
CONFIG = Config("test", 1, 8, loss="cross_entropy", model=ModelConfig("mnist_mlp", 4), optim=SGD, scan_steps=2)


@pytest.fixture(scope="module")
def dataset():
    return brightness_set(32, 10, 10)


@pytest.fixture(scope="module")
def first(tmp_path_factory, dataset):
    """A run, and a file of its variables."""
    folder = tmp_path_factory.mktemp("first") / "run"
    train(CONFIG, folder, data=dataset)
    variables = load_network(folder, dataset).variables
    np.savez(folder.parent / "weights.npz", **flatten_dict(variables, sep="/"))
    return folder, variables


def timeless(result):
    return {name: value for name, value in result.items() if "time" not in name}


def test_a_file_and_a_run_start_the_run_that_their_variables_start(first, dataset, tmp_path):
    folder, variables = first
    expected = train(CONFIG, tmp_path / "given", data=dataset, warm_start=variables)
    for name, source in (("file", folder.parent / "weights.npz"), ("run", folder)):
        config = replace(CONFIG, init_from=str(source))
        result = train(config, tmp_path / name, data=dataset)
        assert timeless(result) == timeless(expected)
        recorded = read_config(tmp_path / name)
        assert recorded.init_from == str(source)
        assert recorded.init_sha256 == with_start(config).init_sha256 != with_start(CONFIG).init_sha256
        assert train(config, tmp_path / name, data=dataset) == result


def test_a_sweep_starts_its_runs_so_and_finds_them_finished(first, dataset, tmp_path):
    folder, _ = first
    config, data = with_data(replace(CONFIG, init_from=str(folder)), dataset)
    runs = [Run(f"seed {seed}", replace(config, seed=seed), tmp_path / str(seed)) for seed in (0, 1)]
    found = run_all(runs, datasets={config.data: data}, tell=lambda text: None)
    assert run_all(runs, datasets={}) == found
    assert read_config(tmp_path / "0").init_sha256 == with_start(config).init_sha256


@pytest.mark.full
def test_runs_mapped_together_start_each_from_its_own(first, dataset, tmp_path):
    folder, variables = first
    np.savez(tmp_path / "half.npz", **flatten_dict(jax.tree.map(lambda leaf: leaf * 0.5, variables), sep="/"))
    configs = [replace(CONFIG, init_from=source) for source in (str(folder), str(tmp_path / "half.npz"))]
    together = train_together(configs, [tmp_path / "a", tmp_path / "b"], data=dataset)
    for name, config, found in zip("cd", configs, together, strict=True):
        alone = train(config, tmp_path / name, data=dataset)
        np.testing.assert_allclose(found["curve"]["train_loss"], alone["curve"]["train_loss"], rtol=1e-4)
    assert together[0]["curve"]["train_loss"] != together[1]["curve"]["train_loss"]


def test_the_variables_of_a_run_are_its_network_s(first, dataset):
    folder, _ = first
    for which in ("best", "last"):
        expected = flatten_dict(load_network(folder, dataset, which=which).variables, sep="/")
        found = variables_of_run(folder, which)
        assert found.keys() == expected.keys()
        assert all(np.array_equal(found[name], expected[name]) for name in found)


@pytest.mark.full
def test_another_file_is_another_run(first, dataset, tmp_path):
    _, variables = first
    path, config = tmp_path / "weights.npz", replace(CONFIG, init_from=str(tmp_path / "weights.npz"))
    np.savez(path, **flatten_dict(variables, sep="/"))
    train(config, tmp_path / "run", data=dataset)
    np.savez(path, **flatten_dict(jax.tree.map(lambda leaf: leaf * 0.5, variables), sep="/"))
    rule = r"`init_from` \(={}\) has not the weights that the run in .*run began with, {}; choose another `--workdir`"
    with pytest.raises(UsageError, match=rule.format(path, f"other ones, of {path}")):
        train(config, tmp_path / "run", data=dataset)
    with pytest.raises(UsageError, match=rule.format(None, f"other ones, of {path}")):
        train(CONFIG, tmp_path / "run", data=dataset)
    with pytest.raises(UsageError, match=rule.format(path, "random weights")):
        train(config, first[0], data=dataset)


@pytest.mark.full
def test_a_finished_run_needs_its_start_no_more(first, dataset, tmp_path):
    _, variables = first
    path, config = tmp_path / "weights.npz", replace(CONFIG, init_from=str(tmp_path / "weights.npz"))
    np.savez(path, **flatten_dict(variables, sep="/"))
    result = train(config, tmp_path / "run", data=dataset)
    path.unlink()
    assert train(config, tmp_path / "run", data=dataset) == result
    with pytest.raises(UsageError, match=r"`init_from` \(=.*\) is not there; give a file of weights"):
        train(config, tmp_path / "another", data=dataset)


@pytest.mark.full
def test_what_does_not_fit_is_listed_and_what_is_fresh_is_not(first, dataset):
    folder, _ = first
    wider = validate(replace(CONFIG, model=ModelConfig("mnist_mlp", 4, options={"hidden_layers": 4})))
    with pytest.raises(UsageError) as refused:
        start_of(replace(wider, init_from=str(folder)), dataset)
    text = str(refused.value)
    assert text.startswith(
        f"`init_from` (={folder}) does not start this run: the weights do not fit the network; missing: "
    )
    assert "batch_stats/norm4/mean, " in text
    fresh = {"init_from": str(folder), "init_options": {"fresh": ("*/dense4/*", "*/norm4/*")}}
    start = start_of(replace(wider, **fresh), dataset)
    assert "dense4" not in start["params"]
    assert "dense3" in start["params"]
    alone = replace(wider, init_from=str(folder), init_options={"fresh": "*4/*"})
    assert jax.tree.structure(start_of(alone, dataset)) == jax.tree.structure(start)


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        (
            {"init_from": "nowhere.npz"},
            r"`init_from` \(=nowhere.npz\) is not there; give a file of weights or the folder",
        ),
        ({"init_options": {"fresh": "x"}}, r"`init_options` .* is for `init_from`; give that too"),
        ({"init_from": "{run}", "init_options": {"which": "first"}}, r"`init_options.which` \(='first'\) must be best"),
        ({"init_from": "{run}", "init_options": {"layout": "bireal"}}, r"`init_options` \(='layout'\) is not known"),
        ({"init_from": "{run}/config.json"}, r"must end in \.npz, \.pth"),
    ],
)
def test_what_cannot_start_a_run(first, dataset, changes, text):
    named = {key: value.format(run=first[0]) if isinstance(value, str) else value for key, value in changes.items()}
    with pytest.raises(UsageError, match=text):
        start_of(with_start(validate(replace(CONFIG, **named))), dataset)


def test_it_is_one_start_or_the_other(first, dataset, tmp_path):
    config = replace(CONFIG, init_from=str(first[0]))
    with pytest.raises(UsageError, match=r"`init_from` .* does not go with `warm_start`"):
        train(config, tmp_path, data=dataset, warm_start=first[1])


@pytest.mark.full
def test_the_first_stage_starts_from_it(first, dataset, tmp_path):
    config = replace(CONFIG, init_from=str(first[0]))
    said, stages = [], [Stage("a", config), Stage("b", config, initialise_from="a")]
    run_stages(stages, tmp_path, data=dataset, announce=said.append)
    assert said[0] == f"stage 1/2 a: starts from {first[0]}"
    assert [read_config(tmp_path / name).init_from for name in ("a", "b")] == [str(first[0]), None]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda found: found["params"], r"`warm_start` has dense1/latent_kernel, .* \.\.\., which the network"),
        (
            lambda found: {"params": {"dense_1": found["params"]["dense1"]}},
            r"`warm_start` has params/dense_1/latent_kernel, which the network does not have; give variables",
        ),
        (
            lambda found: {"params": {"dense1": {"latent_kernel": np.zeros((64, 3), np.float32)}}},
            r"`warm_start` has params/dense1/latent_kernel as float32\[64, 3\], the network has it as float32\[64, 4\]",
        ),
        (
            lambda found: {"params": {"dense1": {"latent_kernel": np.zeros((64, 4), np.int32)}}},
            r"as int32\[64, 4\], the network has it as float32\[64, 4\]; convert it, or leave it out",
        ),
    ],
)
def test_variables_that_are_not_the_networks_are_refused(first, dataset, tmp_path, change, message):
    with pytest.raises(UsageError, match=message):
        train(CONFIG, tmp_path / "run", data=dataset, warm_start=change(first[1]))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("given", ["runs/mine", [1.0]])
def test_what_is_no_variables_is_refused(dataset, tmp_path, given):
    with pytest.raises(UsageError, match=r"^`warm_start` \(=.*\) must be variables, as `run.variables` has"):
        train(CONFIG, tmp_path / "run", data=dataset, warm_start=given)


class Boxed(nn.Module):
    num_classes: int

    @nn.compact
    def __call__(self, x, train=False):
        init = nn.with_partitioning(nn.initializers.lecun_normal(), (None, None))
        x = BinaryDense(4, "ste_sign", "xnor", kernel_init=init)(x.reshape(len(x), -1))
        return nn.Dense(self.num_classes, kernel_init=init)(x)


def test_what_a_network_puts_into_boxes_is_trained_without_them(dataset, tmp_path):
    """`nn.with_partitioning` puts parameters into boxes that say how they are divided among devices."""
    config = replace(CONFIG, model=ModelConfig(Boxed))
    programs = programs_of(validate(with_data(config, dataset)[0]), dataset)
    params = initial_state(programs, 1).train.params
    assert nn.unbox(params) == params
    boxed = jax.tree.map(lambda leaf: nn.Partitioned(leaf, (None,) * leaf.ndim), params)
    for given in (boxed, params):
        chex.assert_trees_all_equal(initial_state(programs, 0, warm_start={"params": given}).train.params, params)
    kept = {"params": {"Dense_0": params["Dense_0"]}}
    partly = initial_state(programs, 0, warm_start=kept).train.params
    assert jax.tree.structure(partly) == jax.tree.structure(params)


@pytest.mark.full
def test_a_run_of_boxed_parameters_starts_another_and_is_stored(dataset, tmp_path):
    config = replace(CONFIG, model=ModelConfig(Boxed))
    run = bnn_jax.train(config, tmp_path / "run", data=dataset)
    images = dataset.test.images
    save(tmp_path / "net.bnn.safetensors", run.freeze())
    stored = load(tmp_path / "net.bnn.safetensors", model=Boxed)
    np.testing.assert_array_equal(stored.logits(images), run.freeze().logits(images))
    chex.assert_trees_all_equal_shapes(latent_variables(stored)["params"], run.variables["params"])
    other = replace(config, init_from=str(tmp_path / "run"), seed=1)
    assert train(other, tmp_path / "other", data=dataset)["test_accuracy_last"] is not None


@pytest.mark.parametrize("given", [{}, {"params": {}}, {"params": {"dense1": None}}])
def test_no_variables_are_no_start(dataset, tmp_path, given):
    with pytest.raises(UsageError, match=r"^`warm_start` \(=.*\) must hold variables; None starts at random$"):
        train(CONFIG, tmp_path / "run", data=dataset, warm_start=given)


def test_narrow_and_wide_variables_are_taken_in_the_networks_dtype(first, dataset):
    programs = programs_of(validate(with_data(CONFIG, dataset)[0]), dataset)
    for dtype in (np.float16, np.float64):
        given = jax.tree.map(lambda x, dtype=dtype: np.asarray(x, dtype), first[1])
        state = initial_state(programs, 0, warm_start=given).train
        for (path, found), value in zip(jax.tree.leaves_with_path(state.params), jax.tree.leaves(given["params"])):
            assert found.dtype == np.float32, path
            np.testing.assert_array_equal(found, value.astype(np.float32))
