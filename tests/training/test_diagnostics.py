"""Diagnostics against counts outside jit, closed forms and brute force over single weights."""

import json
from dataclasses import replace
from itertools import pairwise

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_sets import brightness_set

from bnn_jax.errors import UsageError
from bnn_jax.layers import BatchNorm, BinaryConv, BinaryDense
from bnn_jax.losses import cross_entropy
from bnn_jax.quantizers import ACTIVATION_QUANTIZERS, WEIGHT_QUANTIZERS, make_quantizer
from bnn_jax.training.checkpoint import restore_checkpoint
from bnn_jax.training.config import Config, DiagnosticsConfig, ModelConfig, OptimConfig
from bnn_jax.training.diagnostics import (
    COLLECTION,
    Flips,
    count_flips,
    flip_parts,
    flip_slopes,
    histogram,
    histogram_bounds,
    latent_kernels,
    no_flips,
    sample_coordinates,
    tap_quantizers,
    tapped_parts,
)
from bnn_jax.training.epoch import Batches
from bnn_jax.training.experiment import ImageInfo, hyper_parameters, make_experiment
from bnn_jax.training.loop import train
from bnn_jax.training.metrics import diagnostics_record, read_metrics
from bnn_jax.training.programs import initial_state, programs_of
from bnn_jax.training.step import diagnose_step, init_state
from bnn_jax.training.validation import validate

ON = DiagnosticsConfig(every_steps=3, histogram_bins=8, mismatch_coordinates=3)
CONFIG = Config(
    "test",
    epochs=2,
    batch_size=22,
    scan_steps=1,
    loss="cross_entropy",
    model=ModelConfig("resnet6", width=4, input_quantizer="ste_sign", kernel_quantizer="xnor"),
    optim=OptimConfig("adam", 0.05),
    diagnostics=ON,
)
INFO = ImageInfo((8, 8, 1), 3, (120.0,), (60.0,))
RNG = np.random.default_rng(0)


def sign(x):
    return np.where(np.asarray(x) < 0, -1, 1)


def share(parts, layer, name):
    total, size = parts[layer][name]
    return float(total) / float(size)


# -- flips


def test_flips_of_a_walk_are_those_counted_outside_jit():
    walk = np.cumsum(RNG.normal(size=(12, 3, 5)), axis=0).round()  # rounding makes zeros, and -0.0
    params = [{"a": {"conv": {"latent_kernel": jnp.asarray(w)}}, "head": {"kernel": jnp.asarray(w)}} for w in walk]

    @jax.jit
    def counted(stacked):
        def body(flips, pair):
            return count_flips(flips, *pair), None

        pairs = (jax.tree.map(lambda w: w[:-1], stacked), jax.tree.map(lambda w: w[1:], stacked))
        return jax.lax.scan(body, no_flips(params[0]), pairs)[0]

    flips = counted(jax.tree.map(lambda *leaves: jnp.stack(leaves), *params))
    expected = sum(sign(a) != sign(b) for a, b in pairwise(walk))
    assert (walk == 0).any()
    assert list(flips.counts) == ["a/conv"]
    assert int(flips.steps) == 11
    np.testing.assert_array_equal(flips.counts["a/conv"], expected)
    parts = flip_parts(flips)
    assert share(parts, "a/conv", "flips") == pytest.approx(expected.sum() / (11 * 15))
    assert share(parts, "a/conv", "net_flips") == pytest.approx((sign(walk[0]) != sign(walk[-1])).mean())
    assert share(parts, "a/conv", "flip_flops") == pytest.approx((expected >= 2).mean())
    assert 0 < share(parts, "a/conv", "never_flipped") == pytest.approx((expected == 0).mean())


def test_without_a_step_there_are_no_flips():
    parts = flip_parts(no_flips({"conv": {"latent_kernel": jnp.ones(4)}}))
    assert {name: share(parts, "conv", name) for name in parts["conv"]} == {
        "flips": 0,
        "net_flips": 0,
        "flip_flops": 0,
        "never_flipped": 1,
    }


# -- what quantizers do

X = np.concatenate([RNG.normal(size=500) * 1.5, [-1.0, 1.0, 0.0, 1.5, -0.5]]).astype(np.float32).reshape(5, 101)

SATURATED = {
    "identity_sign": ({}, lambda x: np.zeros_like(x)),
    "ste_sign": ({}, lambda x: abs(x) > 1),
    "ste_sign, wide": ({"clip_value": 1.5}, lambda x: abs(x) > 1.5),
    "approx_sign": ({}, lambda x: abs(x) >= 1),
    "rsign": ({}, lambda x: abs(x - SHIFT) >= 1),
    "unbalanced": ({}, lambda x: abs(x - 0.5) > 1),
    "dorefa": ({"bits": 2}, lambda x: (x < 0) | (x > 1)),
}
SHIFT = 0.25


@pytest.mark.parametrize("case", SATURATED)
def test_saturated_are_the_inputs_that_get_no_gradient(case):
    options, is_saturated = SATURATED[case]
    quantizer = make_quantizer(ACTIVATION_QUANTIZERS, case.split(",")[0], **options)
    layer = BinaryDense(2, input_quantizer=quantizer, kernel_quantizer=make_quantizer(WEIGHT_QUANTIZERS, "xnor"))
    variables = layer.init(jax.random.key(0), jnp.asarray(X))
    if case == "rsign":
        shift = variables["params"]["input_quantizer"]["shift"]
        variables["params"]["input_quantizer"]["shift"] = jnp.full_like(shift, SHIFT)
    with tap_quantizers():
        y, updated = layer.apply(variables, jnp.asarray(X), mutable=[COLLECTION])
    np.testing.assert_array_equal(y, layer.apply(variables, jnp.asarray(X)))
    parts = tapped_parts(updated[COLLECTION])
    assert share(parts, "", "input_saturation") == pytest.approx(is_saturated(X).mean())
    kernel = np.asarray(variables["params"]["latent_kernel"])
    assert share(parts, "", "kernel_balance") == pytest.approx(sign(kernel).mean(), abs=1e-6)
    assert share(parts, "", "kernel_saturation") == 0
    if case != "dorefa":
        moved = {"rsign": SHIFT, "unbalanced": 0.5}.get(case, 0)
        assert share(parts, "", "input_balance") == pytest.approx(sign(X - np.float32(moved)).mean(), abs=1e-6)


def test_weights_outside_the_box_are_saturated():
    layer = BinaryDense(3, kernel_quantizer=make_quantizer(WEIGHT_QUANTIZERS, "binary"))
    kernel = jnp.asarray(X[:, :3])
    with tap_quantizers():
        _, updated = layer.apply({"params": {"latent_kernel": kernel}}, jnp.ones((1, 5)), mutable=[COLLECTION])
    parts = tapped_parts(updated[COLLECTION])
    assert set(parts[""]) == {"kernel_balance", "kernel_saturation"}
    assert share(parts, "", "kernel_saturation") == pytest.approx((abs(X[:, :3]) > 1).mean())


class Twice(nn.Module):
    """One layer that is called on x and on -3x."""

    quantizer: object

    @nn.compact
    def __call__(self, x):
        layer = BinaryDense(2, input_quantizer=self.quantizer, name="layer")
        return layer(x) + layer(-3 * x)


def test_a_layer_that_is_called_twice_counts_both_calls():
    model = Twice(make_quantizer(ACTIVATION_QUANTIZERS, "ste_sign"))
    variables = model.init(jax.random.key(0), jnp.asarray(X))
    with tap_quantizers():
        _, updated = model.apply(variables, jnp.asarray(X), mutable=[COLLECTION])
    parts = tapped_parts(updated[COLLECTION])
    both = np.concatenate([X, -3 * X])
    assert share(parts, "layer", "input_saturation") == pytest.approx((abs(both) > 1).mean())
    assert share(parts, "layer", "input_balance") == pytest.approx(sign(both).mean(), abs=1e-6)


NAMES = [("input", name) for name in ACTIVATION_QUANTIZERS if name != "full_precision"]
NAMES += [("kernel", name) for name in WEIGHT_QUANTIZERS if name != "full_precision"]


@pytest.mark.parametrize(("kind", "name"), NAMES)
def test_every_quantizer_of_the_tables_can_be_tapped(kind, name):
    """Outputs keep their shapes and the other collections their structure; both statistics are there."""
    table = ACTIVATION_QUANTIZERS if kind == "input" else WEIGHT_QUANTIZERS
    layer = BinaryConv(2, **{f"{kind}_quantizer": make_quantizer(table, name)})
    x = jnp.ones((2, 4, 4, 3))

    def outputs(tapped):
        rngs = {"params": jax.random.key(0), "quantizer": jax.random.key(1)}
        variables = layer.init(rngs, x, train=True)
        names = [key for key in variables if key != "params"]
        if not tapped:
            return layer.apply(variables, x, train=True, rngs=rngs, mutable=names)
        with tap_quantizers():
            return layer.apply(variables, x, train=True, rngs=rngs, mutable=[*names, COLLECTION])

    (y, plain), (tapped_y, updated) = (jax.eval_shape(lambda flag=flag: outputs(flag)) for flag in (False, True))
    collection = updated.pop(COLLECTION)
    assert (tapped_y.shape, tapped_y.dtype) == (y.shape, y.dtype)
    assert jax.tree.structure(updated) == jax.tree.structure(plain)
    assert set(collection) == {f"{kind}_balance", f"{kind}_saturation"}


def test_a_stochastic_quantizer_draws_the_same_codes_when_it_is_tapped():
    layer = BinaryDense(2, input_quantizer=make_quantizer(ACTIVATION_QUANTIZERS, "gumbel_sign"))
    variables = layer.init(jax.random.key(0), jnp.asarray(X))
    given = {"train": True, "rngs": {"quantizer": jax.random.key(3)}}
    with tap_quantizers():
        tapped, _ = layer.apply(variables, jnp.asarray(X), mutable=[COLLECTION], **given)
    np.testing.assert_array_equal(tapped, layer.apply(variables, jnp.asarray(X), **given))


# -- mismatch and histograms


def test_flip_slopes_are_half_the_difference_between_the_codes():
    """Brute force over the weights that are asked for, with a loss that couples them and depends on magnitudes."""
    kernels = {"a": RNG.normal(size=(3, 4)), "b": RNG.normal(size=(5,))}
    kernels["b"][2] = 0
    params = {name: {"latent_kernel": jnp.asarray(w, jnp.float32), "bias": jnp.ones(2)} for name, w in kernels.items()}
    coordinates = {"a": jnp.array([0, 11, 5, 5]), "b": jnp.array([4, 2, 0, 1])}

    def loss(a, b, xp, sign):
        return (xp.outer(sign(a), sign(b)) * xp.outer(a, abs(b)) ** 2).sum() + sign(a)[3] * sign(b)[0]

    def loss_of(params):
        codes = lambda x: jnp.where(x < 0, -1.0, 1.0)
        return loss(*(params[name]["latent_kernel"].ravel() for name in "ab"), jnp, codes)

    found = flip_slopes(loss_of, params, coordinates)
    for name, asked in coordinates.items():
        for position, slope in zip(asked, found[name]):
            sides = []
            for side in (1, -1):
                moved = {key: w.ravel().copy() for key, w in kernels.items()}
                moved[name][position] = side * abs(moved[name][position])
                sides.append(loss(moved["a"], moved["b"], np, sign))
            expected = 0 if kernels[name].ravel()[position] == 0 else (sides[0] - sides[1]) / 2
            assert float(slope) == pytest.approx(expected, rel=1e-4, abs=1e-5)


def test_coordinates_are_positions_of_each_layer():
    params = {name: {"latent_kernel": jnp.zeros(shape)} for name, shape in (("a", (2, 3)), ("b", (1000,)))}
    drawn = sample_coordinates(jax.random.key(0), params, 40)
    assert drawn["a"].shape == drawn["b"].shape == (40,)
    assert set(np.asarray(drawn["a"]).tolist()) == set(range(6))
    assert int(drawn["b"].max()) > 500
    assert int(drawn["b"].max()) < 1000


@pytest.mark.parametrize("bounds", [(-1.0, 1.0), (-0.5, 2.0)])
def test_histograms_are_those_of_numpy_with_what_is_outside_in_the_last_bins(bounds):
    w = RNG.normal(size=(10, 50)).astype(np.float32)
    expected, _ = np.histogram(np.clip(w, *bounds), bins=10, range=bounds)
    np.testing.assert_array_equal(histogram(jnp.asarray(w), bins=10, bounds=bounds), expected)
    at_bounds = histogram(jnp.array(bounds), bins=10, bounds=bounds)
    np.testing.assert_array_equal(at_bounds, [1, *[0] * 8, 1])


@pytest.mark.parametrize(
    ("box", "bounds"), [((-2, 3), (-2, 3)), (None, (-1, 1)), ((float("-inf"), float("inf")), (-1, 1))]
)
def test_histograms_span_the_box_where_there_is_one(box, bounds):
    assert histogram_bounds(box) == bounds


# -- a network in training


@pytest.fixture(scope="module")
def dataset():
    return brightness_set(88)


@pytest.fixture(scope="module")
def trained(dataset):
    """Three steps, one jitted call each: the latent kernels around every step, the last state and its diagnostics."""
    programs = programs_of(CONFIG, dataset)
    state = initial_state(programs, 0).train
    images, labels = jnp.asarray(dataset.train.images), jnp.asarray(dataset.train.labels)
    order = np.asarray(programs.epoch_permutation(state.seed, np.int32(1)))
    kernels = [jax.device_get(latent_kernels(state.params))]
    for row in order[:3]:
        state, _ = programs.train(state, Batches(images, labels, jnp.asarray(row[None])), hyper_parameters(CONFIG))
        kernels.append(jax.device_get(latent_kernels(state.params)))
    found = jax.device_get(programs.diagnose(state, images[order[2]], labels[order[2]]))
    x = (dataset.train.images[order[2]].astype(np.float32) - 120) / 60
    return {"kernels": kernels, "state": state, "found": found, "x": x, "labels": dataset.train.labels[order[2]]}


LAYERS = ("stage1_block1/conv1", "stage1_block1/conv2", "stage2_block1/conv1", "stage2_block1/conv2")


@pytest.mark.full
def test_flips_of_training_are_those_counted_outside_jit(trained):
    found = trained["found"]
    assert set(found["layers"]) == set(LAYERS)
    assert int(found["steps"]) == 3
    together = []
    for layer in LAYERS:
        signs = np.stack([sign(kernels[layer]).ravel() for kernels in trained["kernels"]])
        counts = (signs[1:] != signs[:-1]).sum(axis=0)
        together.append(counts)
        own = found["layers"][layer]
        assert own["flips"] == pytest.approx(counts.mean() / 3)
        assert own["net_flips"] == pytest.approx((signs[0] != signs[-1]).mean())
        assert own["flip_flops"] == pytest.approx((counts >= 2).mean())
        assert own["never_flipped"] == pytest.approx((counts == 0).mean())
    counts = np.concatenate(together)
    assert 0 < counts.mean() / 3 == pytest.approx(found["total"]["flips"])
    assert found["total"]["flip_flops"] == pytest.approx((counts >= 2).mean())
    for layer in LAYERS:
        w = trained["kernels"][-1][layer]
        np.testing.assert_array_equal(found["layers"][layer]["histogram"], np.histogram(w, 8, (-1, 1))[0])
        assert found["layers"][layer]["kernel_balance"] == pytest.approx(sign(w).mean(), abs=1e-6)
    np.testing.assert_array_equal(
        found["total"]["histogram"], sum(found["layers"][layer]["histogram"] for layer in LAYERS)
    )


@pytest.mark.full
def test_saturation_balance_and_mismatch_of_training(trained):
    """Inputs are captured behind the batch norms; slopes come from turning over one weight after another."""
    state, found = trained["state"], trained["found"]
    experiment = make_experiment(CONFIG, INFO, total_steps=8, learning_rate=0.05)

    @jax.jit
    def loss_and_more(params):
        def loss(params):
            variables = {"params": params} | state.model_state
            (logits, _), captured = experiment.model.apply(
                variables,
                trained["x"],
                train=True,
                mutable=["batch_stats", "intermediates"],
                capture_intermediates=lambda module, _: isinstance(module, BatchNorm),
            )
            return cross_entropy(logits, trained["labels"]).mean(), captured["intermediates"]

        return jax.value_and_grad(loss, has_aux=True)(params)

    (_, captured), gradient = loss_and_more(state.params)
    inputs = {}
    for layer in LAYERS:
        block, conv = layer.split("/")
        inputs[layer] = np.asarray(captured[block][conv.replace("conv", "norm")]["__call__"][0])
        own = found["layers"][layer]
        # A value within rounding of a threshold may fall on its other side in another program.
        assert own["input_saturation"] == pytest.approx((abs(inputs[layer]) > 1).mean(), abs=2 / inputs[layer].size)
        assert own["input_balance"] == pytest.approx(sign(inputs[layer]).mean(), abs=4 / inputs[layer].size)
    everything = np.concatenate([x.ravel() for x in inputs.values()])
    assert 0.05 < found["total"]["input_saturation"] == pytest.approx((abs(everything) > 1).mean(), abs=1e-3)

    key = jax.random.fold_in(jax.random.wrap_key_data(state.seed), state.step)
    coordinates = sample_coordinates(jax.random.fold_in(key, 2), state.params, 3)
    chosen, slopes = [], []
    for layer in LAYERS:
        block, conv = layer.split("/")
        kernel = np.asarray(state.params[block][conv]["latent_kernel"])
        for position in np.asarray(coordinates[layer]):
            sides = []
            for side in (1, -1):
                moved = kernel.copy()
                moved.ravel()[position] = side * abs(moved.ravel()[position])
                params = state.params | {block: state.params[block] | {conv: {"latent_kernel": jnp.asarray(moved)}}}
                sides.append(float(loss_and_more(params)[0][0]))
            slopes.append((sides[0] - sides[1]) / 2)
            chosen.append(float(gradient[block][conv]["latent_kernel"].ravel()[position]))
    cosine = lambda a, b: np.dot(a, b) / np.linalg.norm(a) / np.linalg.norm(b)
    assert found["total"]["gradient_cosine"] == pytest.approx(cosine(chosen, slopes), abs=1e-3)
    for i, layer in enumerate(LAYERS):
        own = slice(3 * i, 3 * i + 3)
        assert found["layers"][layer]["gradient_cosine"] == pytest.approx(cosine(chosen[own], slopes[own]), abs=5e-3)


@pytest.mark.parametrize(
    ("inputs", "kernel", "names"),
    [
        ("ste_sign", "full_precision", {"input_balance", "input_saturation"}),
        (
            "full_precision",
            "ttq",
            {"flips", "net_flips", "flip_flops", "never_flipped", "kernel_balance", "kernel_saturation"}
            | {"histogram", "gradient_cosine"},
        ),
        ("full_precision", "full_precision", set()),
    ],
)
def test_a_network_has_the_diagnostics_of_what_it_quantizes(inputs, kernel, names):
    model = replace(CONFIG.model, input_quantizer=inputs, kernel_quantizer=kernel)
    experiment = make_experiment(replace(CONFIG, model=model), INFO, total_steps=8, learning_rate=0.05)
    images, labels = jnp.zeros((4, 8, 8, 1), jnp.uint8), jnp.zeros(4, jnp.int32)
    found = jax.eval_shape(lambda: diagnose_step(experiment, init_state(experiment, 0), images, labels))
    assert set(found["total"]) == names
    assert set(found["layers"]) == (set(LAYERS) if names else set())


def run_to_end(config, workdir, dataset, stop_after=None):
    """The diagnostics' records and the bits of the last state but for its flips; stopped once without saving."""
    calls = []

    def on_progress(done, total, text):
        calls.append(done)
        if len(calls) == stop_after:
            raise InterruptedError

    if stop_after:
        with pytest.raises(InterruptedError):
            train(config, workdir, data=dataset, on_progress=on_progress)
    train(config, workdir, data=dataset, on_progress=on_progress)
    run = restore_checkpoint(workdir / "checkpoints", initial_state(programs_of(config, dataset), config.seed)).state
    records = [record for record in read_metrics(workdir / "metrics.jsonl") if record["kind"] == "diagnostics"]
    return records, [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(run.train.replace(flips=None))]


@pytest.mark.full
def test_records_resume_and_diagnostics_change_no_bit(tmp_path, dataset):
    whole, bits = run_to_end(CONFIG, tmp_path / "whole", dataset)
    assert [(record["step"], record["epoch"], record["steps"]) for record in whole] == [(3, 1, 3), (6, 2, 3)]
    assert set(whole[0]["layers"]) == set(LAYERS)
    never = [record["total"]["never_flipped"] for record in whole]
    result = json.loads((tmp_path / "whole" / "result.json").read_text())
    assert (result["flips"], result["never_flipped"]) == (whole[1]["total"]["flips"], never[1])
    assert 1 > never[0] > never[1] > 0  # it is not counted from a record anew
    broken, broken_bits = run_to_end(CONFIG, tmp_path / "broken", dataset, stop_after=7)
    assert broken == whole
    assert broken_bits == bits
    off = replace(CONFIG, diagnostics=DiagnosticsConfig())
    none, bits_without = run_to_end(off, tmp_path / "off", dataset)
    assert none == []
    assert bits_without == bits


def test_without_diagnostics_nothing_is_carried_along(dataset):
    off = replace(CONFIG, diagnostics=DiagnosticsConfig())
    shapes = [
        jax.eval_shape(lambda c=c: init_state(make_experiment(c, INFO, total_steps=8, learning_rate=0.05), 0))
        for c in (CONFIG, off)
    ]
    assert isinstance(shapes[0].flips, Flips)
    assert shapes[1].flips is None
    assert len(jax.tree.leaves(shapes[0])) - len(jax.tree.leaves(shapes[1])) == 2 * len(LAYERS) + 1


def test_a_number_that_is_not_finite_becomes_null():
    found = {"steps": np.int32(3), "total": {"flips": np.float32("nan"), "histogram": np.array([1, 2])}, "layers": {}}
    assert diagnostics_record(found, step=9, epoch=2) == {
        "kind": "diagnostics",
        "step": 9,
        "epoch": 2,
        "steps": 3,
        "total": {"flips": None, "histogram": [1, 2]},
        "layers": {},
    }


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"every_steps": 1}, r"`diagnostics\.every_steps` \(=1\) must be 0, which records none, or at least 2"),
        ({"every_steps": -5}, r"`diagnostics\.every_steps` \(=-5\) must be 0, which records none, or at least 2"),
        ({"histogram_bins": 0}, r"`diagnostics\.histogram_bins` \(=0\) must be at least 1; 20 is usual"),
        ({"mismatch_coordinates": -1}, r"`diagnostics\.mismatch_coordinates` \(=-1\) must not be negative; 0 leaves"),
    ],
)
def test_settings_out_of_range_are_refused(settings, message):
    with pytest.raises(UsageError, match=message):
        validate(replace(CONFIG, diagnostics=DiagnosticsConfig(**settings)))
