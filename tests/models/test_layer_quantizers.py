"""Quantizers of single layers by patterns: built, accounted, trained, frozen, saved; refused where none match."""

from dataclasses import replace

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from packed_checks import initialized
from small_models import TEXTS, image_shape, small

from bnn_jax.analysis.accounting import account_model
from bnn_jax.errors import UsageError
from bnn_jax.models import MODELS
from bnn_jax.models.build import build_model
from bnn_jax.outputs import init_network, network_logits
from bnn_jax.packed import PackedModel, freeze, load, save, verify
from bnn_jax.packed.artifact import _is_safe
from bnn_jax.training.config import Config, ModelConfig
from bnn_jax.training.experiment import make_model
from bnn_jax.training.options import options_from_words
from bnn_jax.training.validation import validate

SHAPE = (8, 8, 3)
SETTINGS = {"name": "resnet20", "width": 4, "options": {"stage_sizes": (1, 1)}}


def network(quantizers, **settings):
    return build_model(num_classes=10, quantizers=quantizers, **SETTINGS | settings)


def bits_of(model):
    return {layer.name: layer.weight_bits for layer in account_model(model, SHAPE).layers if layer.weights}


def names(bits):
    return {name.rpartition("/")[0].split("/")[0] for name in bits}


def test_one_stage_the_first_and_the_last_layer_have_quantizers_of_their_own():
    bits = bits_of(network({"stage2_*": "real", "stem": ("full_precision", "xnor"), "head": "8-bit"}))
    wanted = {"stem": 1, "head": 8, "stage1_block1": 1, "stage2_block1": 32}
    assert {name.split("/")[0] for name in bits} == wanted.keys()
    assert all(bits[name] == wanted[name.split("/")[0]] for name in bits)
    assert bits_of(network({})) == {
        name: {"stem": 32, "head": 32}.get(name.split("/")[0], 1) for name in bits_of(network({}))
    }


def test_the_first_pattern_counts():
    bits = bits_of(network({"*/conv2": None, "stage1_block1": {"kernel_quantizer": "twn"}, "*": "binary"}))
    kinds = {name.rpartition("/")[0]: value for name, value in bits.items()}
    assert kinds["stage1_block1/conv1"] == 2 and kinds["stage1_block1/conv2"] == 32
    assert kinds["stage2_block1/conv1"] == kinds["stem"] == kinds["head"] == 1


def test_real_layers_have_their_activation_and_a_real_network_takes_binary_layers():
    """All layers real by a pattern: the network in full precision, whose activation stands in the same places here."""
    real = build_model(num_classes=10, **SETTINGS, input_quantizer="full_precision", kernel_quantizer="full_precision")
    variables = initialized(real, SHAPE)
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, *SHAPE)), jnp.float32)
    logits = jax.jit(lambda v, x: real.apply(v, x, train=False)[0])(variables, x)
    for model in (network({"*": "real"}), network({"*": "real"}, input_quantizer="full_precision")):
        found = jax.jit(lambda v, x, model=model: model.apply(v, x, train=False)[0])(variables, x)
        np.testing.assert_allclose(found, logits, rtol=1e-5, atol=1e-5)
    mixed = network({"stage2_*": "binary"}, input_quantizer="full_precision", kernel_quantizer="full_precision")
    assert bits_of(mixed) == {name: 1 if name.startswith("stage2") else 32 for name in bits_of(mixed)}


@pytest.mark.parametrize(
    ("name", "inputs"),
    [
        ("mnist_mlp", None),
        ("mnist_mlp", "full_precision"),
        pytest.param("alexnet_dorefa", "full_precision", marks=pytest.mark.full),
    ],
)
def test_a_network_whose_layers_are_all_real_is_the_one_in_full_precision(name, inputs):
    shape = image_shape(name, 64)
    bare = {"input_quantizer_options": {}, "kernel_quantizer_options": {}, "gradient_quantizer": None}
    full = bare | {"input_quantizer": "full_precision", "kernel_quantizer": "full_precision"}
    real = make_model(replace(small(name), **full, gradient_quantizer_options={}), num_classes=10)
    given = {} if inputs is None else bare | {"input_quantizer": inputs, "gradient_quantizer_options": {}}
    model = make_model(replace(small(name), **given, quantizers={"*": "real"}), num_classes=10)
    variables = initialized(real, shape)
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, *shape)), jnp.float32)
    logits, found = (jax.jit(lambda v, x, m=m: m.apply(v, x, train=False)[0])(variables, x) for m in (real, model))
    np.testing.assert_allclose(found, logits, rtol=1e-5, atol=1e-5 * np.abs(logits).max())


BARE = {f"{kind}_quantizer_options": {} for kind in ("input", "kernel", "gradient")}
FULL = BARE | {"input_quantizer": "full_precision", "kernel_quantizer": "full_precision", "gradient_quantizer": None}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name == "resnet18" else pytest.mark.full) for name in MODELS]
)
def test_a_pattern_changes_no_layer_that_it_does_not_name(name):
    """In a network in full precision, whose head is real anyway: all else has its activations where it had them."""
    shape = image_shape(name, 32)
    plain, other = (
        make_model(replace(small(name), **FULL, quantizers=quantizers), num_classes=10)
        for quantizers in ({}, {"head": "real"})
    )
    variables = initialized(plain, shape)
    x = np.random.default_rng(0).normal(size=(2, *shape))
    x = jnp.asarray(np.abs(x.round()) if name in TEXTS else x, jnp.float32)
    logits, found, cloned = (
        jax.jit(lambda v, x, m=m: network_logits(m, v, x))(variables, x)
        for m in (plain, other, other.clone(quantizers=None))
    )
    np.testing.assert_allclose(found, logits, rtol=1e-5, atol=1e-5 * np.abs(logits).max())
    np.testing.assert_array_equal(cloned, logits)


@pytest.mark.parametrize("name", ["resnet18", "wide_resnet40_4"])
def test_a_quantizer_on_a_shortcut_stands_in_the_place_of_relu(name):
    """Behind one all codes would be +1."""
    shape = image_shape(name, 16)
    model = make_model(replace(small(name), **FULL, quantizers={"stage2_*": "binary"}), num_classes=10)
    variables, seen = initialized(model, shape), {}

    def watch(call, arguments, options, context):
        returned = call(*arguments, **options)
        if context.method_name == "__call__" and context.module.name == "downsample":
            seen[context.module.path] = returned
        return returned

    with nn.intercept_methods(watch):
        network_logits(model, variables, jnp.asarray(np.random.default_rng(0).normal(size=(4, *shape)), jnp.float32))
    (outputs,) = (y for path, y in seen.items() if path[0].startswith("stage2"))
    assert outputs.std((0, 1, 2)).min() > 0.01


def test_patterns_reach_the_standardized_convolutions():
    """Those without a kernel quantizer are standardized and have a gain, whichever way they came to have none."""
    settings, shape = small("reactnet18_bn_free"), (16, 16, 3)
    plain = make_model(replace(settings, **FULL), num_classes=10)
    variables = initialized(plain, shape)
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, *shape)), jnp.float32)
    real = make_model(replace(settings, quantizers={"*": "real"}), num_classes=10)
    np.testing.assert_array_equal(network_logits(real, variables, x), network_logits(plain, variables, x))
    for quantizers, latent in (({"stem": "binary"}, "stem"), ({"stage2_*": "real"}, "stage1_block1/conv1")):
        made = initialized(make_model(replace(settings, quantizers=quantizers), num_classes=10), shape)["params"]
        flat = flatten_dict(made, sep="/")
        assert f"{latent}/latent_kernel" in flat and f"{latent}_gain/scale" not in flat
    assert "stage2_block1/conv1_gain/scale" in flat and "stage2_block1/conv1/kernel" in flat


def test_real_hidden_layers_drop_as_those_in_full_precision_do():
    model = build_model("mnist_mlp", num_classes=10, width=512, quantizers={"*": "real"})
    x = jnp.ones((4, 4, 4, 1))
    variables = initialized(model, x.shape[1:])
    outputs = []

    def watch(call, arguments, options, context):
        y = call(*arguments, **options)
        if context.module.name == "dense2":
            outputs.append(context.module.real_activation(jnp.ones((4, 2000))))
        return y

    with nn.intercept_methods(watch):
        model.apply(variables, x, train=True, rngs={"quantizer": jax.random.key(0)}, mutable=["batch_stats"])
    (dropped,) = outputs
    assert set(np.unique(dropped)) == {0.0, 2.0} and 0.9 < dropped.mean() < 1.1


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=() if name in ("lenet", "binary_densenet28") else pytest.mark.full) for name in MODELS],
)
def test_every_network_takes_patterns(name):
    model = make_model(replace(small(name), quantizers={"*": "real"}), num_classes=10)
    images = jax.ShapeDtypeStruct((1, *image_shape(name, 32)), "float32")
    _, variables = jax.eval_shape(lambda key, x: init_network(model, key, x), jax.random.key(0), images)
    kernels = {path[-1].key for path, _ in jax.tree_util.tree_leaves_with_path(variables["params"])}
    assert "kernel" in kernels and "latent_kernel" not in kernels


@pytest.mark.full
def test_a_mixed_network_is_frozen_saved_and_loaded(tmp_path):
    quantizers = {"stage2_*": "real", "head": "8-bit"}
    model = network(quantizers)
    variables = initialized(model, SHAPE)
    packed = freeze(model, variables, SHAPE)
    images = np.random.default_rng(0).integers(0, 256, (4, *SHAPE), dtype=np.uint8)
    found = verify(model, variables, packed, [jnp.asarray(images, jnp.float32) / 128 - 1])
    assert found.passed and found.layers["head"].path == "float32"
    described = {"model": SETTINGS | {"quantizers": quantizers}, "image_shape": SHAPE}
    save(tmp_path / "net", PackedModel(model, packed, described | {"mean": (128,) * 3, "std": (128,) * 3}))
    loaded = load(tmp_path / "net")
    assert loaded.metadata["model"]["quantizers"] == quantizers
    np.testing.assert_array_equal(
        jax.jit(loaded.apply)(packed, images), jax.jit(loaded.apply)(loaded.variables, images)
    )


def test_a_config_and_a_command_line_take_them():
    quantizers = options_from_words(["stage2_*", "real", "head", "8-bit", "stem", "full_precision,xnor"])
    config = Config("patterns", epochs=1, batch_size=1, model=ModelConfig("resnet6", quantizers=quantizers))
    assert make_model(validate(config).model, num_classes=10).quantizers.given == quantizers
    wrong = replace(config, model=ModelConfig("resnet6", quantizers={"head": "real_"}))
    with pytest.raises(UsageError, match=r"model.quantizers.*`quantizers\['head'\]` \(='real_'\).*did you mean 'real'"):
        validate(wrong)


@pytest.mark.parametrize("choice", ["os:system", ("ste_sign", "os:system"), {"kernel_quantizer": "os:system"}], ids=str)
def test_a_file_may_not_import_what_its_settings_nest(choice):
    assert not _is_safe({"name": "lenet", "quantizers": {"head": choice}})
    assert not _is_safe({"name": "lenet", "options": {"quantizers": {"head": choice}}})
    assert _is_safe({"name": "lenet", "quantizers": {"head": ("ste_sign", "xnor"), "conv1": "8-bit"}})


@pytest.mark.parametrize(
    ("quantizers", "text"),
    [
        ({"stage9_*": "real"}, r"`quantizers` \(='stage9_\*'\) matches no layer; the layers are stem, stage1_block1/c"),
        ({"head": "9-bit"}, r"`quantizers\['head'\]` \(='9-bit'\) is not known; did you mean '8-bit'"),
        ({"head": {"kernel": "xnor"}}, r"`quantizers\['head'\]` .* must be a name of real, binary, 8-bit, a pair or a"),
        ({"head": ("ste_sing", "xnor")}, r"`quantizers\['head'\]` \(='ste_sing'\) .*did you mean 'ste_sign'"),
        ("real", r"`quantizers` \(='real'\) must be a mapping of patterns; to each a name of real, binary"),
    ],
)
def test_what_matches_or_means_nothing_is_refused(quantizers, text):
    with pytest.raises((ValueError, UsageError), match=f"^{text}"):
        model = network(quantizers)
        jax.eval_shape(lambda x: model.init(jax.random.key(0), x, train=False), jnp.ones((1, *SHAPE)))
