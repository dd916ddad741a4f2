"""A frozen network is the trained one: every model, every quantizer, every integer."""

import re
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from networks import random_variables
from packed_checks import compare, initialized

from bnn_jax.estimators import ESTIMATORS, ste_sign
from bnn_jax.layers import BatchNorm, BinaryConv, BinaryDense, max_pool
from bnn_jax.packed import freeze, packed_structure, verify
from bnn_jax.packed.freezing import threshold_chains
from bnn_jax.quantizers import ACTIVATION_QUANTIZERS, WEIGHT_QUANTIZERS, Quantized, Quantizer, make_quantizer, stateless

sign = partial(make_quantizer, ACTIVATION_QUANTIZERS, "ste_sign")
binary = partial(make_quantizer, WEIGHT_QUANTIZERS, "binary")
SIGNS = {name: record for name, record in ESTIMATORS.items() if record.code_set == (-1, 1) and name != "ste_sign"}
SAME_IN_EVALUATION = {name for name, record in SIGNS.items() if record.schedule is None and not record.stochastic}
"""Estimators of the plain sign, of which the tests of estimators show that they compute the codes of "ste_sign"."""


def adversarial(variables, seed=0):
    """Statistics and parameters that put products exactly on thresholds: integer means, gammas of both signs and 0."""
    rng = np.random.default_rng(seed)

    def value(path, leaf):
        name = path[-1].key
        if name == "scale":
            return rng.choice([-1.5, -1e-30, 0.0, 1e-30, 0.3, 2.0], leaf.shape)
        if name == "mean":
            return rng.integers(-4, 5, leaf.shape)
        if name == "var":
            return rng.choice([1e-6, 0.5, 1.0, 7.0], leaf.shape)
        if name == "bias":
            return rng.choice([0.0, 0.0, -1.0, 0.7], leaf.shape)
        return leaf + 0.1 * rng.normal(size=leaf.shape) if leaf.ndim < 2 else leaf

    return jax.tree_util.tree_map_with_path(lambda path, leaf: jnp.asarray(value(path, leaf), leaf.dtype), variables)


def images_of(shape, batch=2):
    return jnp.asarray(np.random.default_rng(1).normal(size=(batch, *shape)), jnp.float32)


class Chained(nn.Module):
    """conv -> [pool] -> BN -> conv -> BN -> [something] -> dense."""

    kernel_quantizer: object = None
    input_quantizer: object = None
    pool: bool = False
    pool_codes: bool = False
    features: int = 32
    between: str = "nothing"

    @nn.compact
    def __call__(self, images, *, train):
        quantizers = {"input_quantizer": self.input_quantizer or sign(), "kernel_quantizer": self.kernel_quantizer}
        x = BinaryConv(self.features, padding=1, name="conv1", **quantizers)(images, train=train)
        x = max_pool(x) if self.pool else x
        x = BatchNorm(name="norm1")(x, train=train)
        x = nn.hard_tanh(x) if self.between == "clip" else x
        x = max_pool(x) if self.pool_codes else x
        y = BinaryConv(self.features, padding=1, use_bias=True, name="conv2", **quantizers)(x, train=train)
        y = y + x if self.between == "shortcut" else y
        y = BatchNorm(name="norm2")(y, train=train)
        return BinaryDense(5, name="head", **quantizers)(y.reshape(len(y), -1), train=train), {}


def chains_of(model, shape=(6, 6, 3)):
    images = jnp.zeros((1, *shape))
    variables = jax.eval_shape(lambda images: model.init(jax.random.key(0), images, train=False), images)
    return [(chain.layer, chain.norm, chain.consumer) for chain in threshold_chains(model, variables, shape)]


FIRST, SECOND = ("conv1", "norm1", "conv2"), ("conv2", "norm2", "head")


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, [FIRST, SECOND]),
        ({"pool": True}, [FIRST, SECOND]),
        ({"pool_codes": True}, [FIRST, SECOND]),
        ({"between": "clip"}, [SECOND]),
        ({"between": "shortcut"}, []),
        ({"features": 8}, [FIRST]),
    ],
)
def test_thresholds_stand_where_nothing_else_needs_the_numbers(options, expected):
    """A shortcut needs them, a clip comes in between, and 8 channels a pixel do not fill words that flatten."""
    assert chains_of(Chained(binary(), **options)) == expected


HOSTILE = [("binary", {}), ("binary", {"pool": True}), ("binary", {"pool_codes": True}), ("binary", {"features": 8})]
HOSTILE += [("learned_scale", {"pool": True}), ("learned_scale", {}), ("twn", {})]
HOSTILE += [pytest.param("xnor", {}, marks=pytest.mark.default_flags)]


@pytest.mark.parametrize(("kernel", "options"), HOSTILE)
def test_thresholds_agree_with_the_network_on_ties_and_gammas_of_any_sign(kernel, options):
    model = Chained(make_quantizer(WEIGHT_QUANTIZERS, kernel), **options)
    images = images_of((6, 6, 3), batch=16)
    variables = adversarial(initialized(model, (6, 6, 3)))
    if kernel == "learned_scale":  # scales of both signs
        own = variables["params"]["conv1"]["kernel_quantizer"]
        alternate = lambda scale: scale * jnp.where(jnp.arange(scale.size).reshape(scale.shape) % 2, -1, 1)
        variables["params"]["conv1"]["kernel_quantizer"] = jax.tree.map(alternate, own)
    found = compare(model, variables, freeze(model, variables, (6, 6, 3)), images)
    assert found.values > 1000 and found.same, found


class Shifted(BinaryConv):
    """Adds to what a layer returns."""

    def __call__(self, x, **options):
        return super().__call__(x, **options) + 2.0


class Sinking(BinaryConv):
    """Subtracts from what a layer takes."""

    def __call__(self, x, **options):
        return super().__call__(x - 0.5, **options)


class Leaking(BatchNorm):
    """Subtracts from what a normalization returns."""

    def __call__(self, x, **options):
        return super().__call__(x, **options) - 0.5


class Finishing(BinaryConv):
    """Adds inside the layer."""

    def finished(self, y, *others):
        return super().finished(y, *others) + 2.0


class Bordered(BinaryConv):
    """Has another default, and prepares something."""

    padding: int = 1

    def setup(self):
        self.border = self.padding


class Pooling(nn.Module):
    """The pool of Flax, under any name."""

    @nn.compact
    def __call__(self, x):
        return nn.max_pool(x, (2, 2), (2, 2))


def shifted_under(name, x):
    with jax.named_scope(name):
        return x + 2.0


class Extended(nn.Module):
    """conv -> BN -> conv of any classes, with additions in scopes of their names, and a pool of any kind."""

    first: type = BinaryConv
    norm: type = BatchNorm
    second: type = BinaryConv
    beside: str = ""
    pool: str = ""
    input_quantizer: object = "ste_sign"

    @nn.compact
    def __call__(self, x, *, train=False):
        add = lambda x, place: shifted_under(place.split()[1], x) if place == self.beside else x
        signs = {"input_quantizer": self.input_quantizer, "kernel_quantizer": "binary"}
        x = add(self.first(32, name="conv1", **signs)(x, train=train), "behind conv1")
        x = add(self.norm(name="norm")(add(x, "before norm"), train=train), "behind norm")
        x = Pooling(name=self.pool)(x) if self.pool else x
        return self.second(8, name="conv2", **signs)(add(x, "before conv2"), train=train).mean((1, 2))


EXTENDED = [Extended(Shifted), Extended(Finishing), Extended(norm=Leaking), Extended(second=Sinking)]
EXTENDED += [Extended(beside=place) for place in ("behind conv1", "before norm", "behind norm", "before conv2")]
EXTENDED += [Extended(pool="max_pool")]


@pytest.mark.parametrize("model", [*EXTENDED, Extended(), Extended(Bordered, second=Bordered)])
@pytest.mark.full
def test_what_is_computed_under_the_name_of_a_layer_is_no_part_of_a_threshold(model):
    """By the integers that the trained network returns."""
    variables = random_variables(model, (6, 6, 33), mean=0.0)
    images = images_of((6, 6, 33), batch=16)
    frozen = freeze(model, variables, (6, 6, 33))
    assert ("threshold" in frozen["packed"]["norm"]) == (model not in EXTENDED)
    np.testing.assert_array_equal(model.apply(frozen, images), model.apply(variables, images))


class Half(nn.Module):
    """dense -> BN -> dense, its activations in half precision by `dtype` or by those of its inputs."""

    dtype: object = jnp.float32
    inputs: object = jnp.float32

    @nn.compact
    def __call__(self, x, *, train=False):
        signs = {"input_quantizer": "ste_sign", "kernel_quantizer": "xnor", "dtype": self.dtype}
        x = BinaryDense(32, name="first", **signs)(x.astype(self.inputs), train=train)
        x = BinaryDense(10, name="second", **signs)(BatchNorm(name="norm")(x, train=train), train=train)
        return BinaryDense(4, kernel_quantizer="xnor", dtype=self.dtype, name="head")(x).astype(jnp.float32)


HALVES = [Half(jnp.bfloat16), Half(jnp.float16), Half(inputs=jnp.bfloat16), Half(inputs=jnp.float16)]


@pytest.mark.parametrize("model", [*HALVES, Half()])
@pytest.mark.full
def test_thresholds_and_scales_take_in_what_the_network_rounds(model):
    """Sums of 1200 codes of both signs, far from 0, whose products with a scale half precision rounds."""
    rng = np.random.default_rng(0)
    images = jnp.asarray(rng.normal(1.0, 1.0, (256, 1200)), jnp.float32)
    variables = initialized(model, (1200,))
    latent = jnp.asarray(rng.normal(1.0, 1.0, (1200, 32)), jnp.float32)
    sums = np.sign(np.asarray(images, np.float64)) @ np.sign(np.asarray(latent, np.float64))
    sums *= np.abs(np.asarray(latent, np.float64)).mean(0)
    variables["params"]["first"]["latent_kernel"] = latent
    variables["batch_stats"]["norm"] = {"mean": jnp.float32(sums.mean(0)), "var": jnp.float32(sums.var(0))}
    frozen = freeze(model, variables, (1200,))
    assert ("threshold" in frozen["packed"]["norm"]) == (model not in HALVES)
    assert verify(model, variables, frozen, [images]).passed


def test_a_frozen_network_keeps_no_latent_weights_and_no_statistics():
    model = Chained(binary())
    variables = initialized(model, (6, 6, 3))
    frozen = freeze(model, variables, (6, 6, 3))
    assert set(frozen) == {"packed"}
    words = 32 + 9 * 32 * 32 / 32 + 36 * 32 * 5 / 32  # the 27 bits of a filter of conv1 take a word
    assert sum(leaf.size for leaf in jax.tree.leaves(frozen)) == words + 2 * 32
    names = {jax.tree_util.keystr(path[-1:]) for path, _ in jax.tree_util.tree_leaves_with_path(frozen)}
    assert names == {".words", "['threshold']"}


def test_frozen_variables_are_not_frozen_again():
    model = Chained(binary())
    frozen = freeze(model, initialized(model, (6, 6, 3)), (6, 6, 3))
    with pytest.raises(
        ValueError, match=r"^`variables` \(=\['packed'\]\) are frozen already; give the trained ones, as"
    ):
        freeze(model, frozen, (6, 6, 3))


@pytest.mark.parametrize("image_shape", [33, (6, 6, 3.0), "6x6x3", [(6, 6), (3, 1)]])
def test_what_is_no_shape_of_images_is_refused(image_shape, unchecked):
    model = Chained(binary())
    reason = rf"^`image_shape` \(={re.escape(repr(image_shape))}\) must be the sizes of an image; as \(32, 32, 3\)$"
    for function in (partial(freeze, model, initialized(model, (6, 6, 3))), partial(packed_structure, model)):
        with pytest.raises(ValueError, match=reason):
            function(image_shape)
    frozen = freeze(model, initialized(model, (6, 6, 3)), (6, 6, 3))
    for same in ([6, 6, 3], np.array([6, 6, 3])):
        jax.tree.map(np.testing.assert_array_equal, freeze(model, initialized(model, (6, 6, 3)), same), frozen)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (
            lambda v: v["params"],
            r"\(=\['conv1', .*\]\) .* \(6, 6, 3\) \(Tried to access \"latent_kernel\" from",
        ),
        (lambda v: {"params": v["params"]}, r"\(=\['params'\]\) .* \(Tried to access \"mean\" from collection"),
        (
            lambda v: v | {"params": v["params"] | {"conv2": {}}},
            r".* \(Could not find parameter named",
        ),
        (
            lambda v: initialized(Chained(binary()), (6, 6, 4)),
            r".* \(For parameter \"latent_kernel\" in",
        ),
    ],
)
def test_variables_of_another_network_are_refused(change, reason):
    model = Chained(binary())
    text = rf"^`variables` {reason}.*[^.]\); give the trained ones, as `run.variables` has them$"
    with pytest.raises(ValueError, match=text):
        freeze(model, change(initialized(model, (6, 6, 3))), (6, 6, 3))


def test_structure_needs_no_arrays():
    model = Chained(make_quantizer(WEIGHT_QUANTIZERS, "xnor"), pool=True)
    frozen = freeze(model, initialized(model, (6, 6, 3)), (6, 6, 3))
    structure = packed_structure(model, (6, 6, 3))
    assert jax.tree.structure(structure) == jax.tree.structure(frozen)
    assert jax.tree.map(lambda a: (a.shape, a.dtype), structure) == jax.tree.map(lambda a: (a.shape, a.dtype), frozen)


def test_variables_in_boxes_are_frozen_and_verified_as_without():
    """`nn.with_partitioning` puts variables into boxes that say how they are divided among devices."""
    model = Chained(make_quantizer(WEIGHT_QUANTIZERS, "xnor"), pool=True)
    variables = initialized(model, (6, 6, 3))
    boxed = jax.tree.map(lambda leaf: nn.Partitioned(leaf, (None,) * leaf.ndim), variables)
    frozen = freeze(model, variables, (6, 6, 3))
    jax.tree.map(np.testing.assert_array_equal, freeze(model, boxed, (6, 6, 3)), frozen)
    assert threshold_chains(model, boxed, (6, 6, 3)) == threshold_chains(model, variables, (6, 6, 3))
    assert verify(model, boxed, frozen, [images_of((6, 6, 3))]).passed


class Layer(nn.Module):
    """One binary layer."""

    input_quantizer: object
    kernel_quantizer: object
    pad_value: int = 0

    @nn.compact
    def __call__(self, images, *, train):
        quantizers = {"input_quantizer": self.input_quantizer, "kernel_quantizer": self.kernel_quantizer}
        y = BinaryConv(7, strides=(2, 2), padding=1, pad_value=self.pad_value, name="conv", **quantizers)(
            images, train=train
        )
        return BinaryDense(4, name="dense", **quantizers)(y.reshape(len(y), -1), train=train), {}


PAIRS = [(name, {}, "binary", {}) for name in ACTIVATION_QUANTIZERS if name not in SAME_IN_EVALUATION]
PAIRS += [("ste_sign", {}, name, {}) for name in WEIGHT_QUANTIZERS]
PAIRS = [pair for pair in PAIRS if "full_precision" not in pair]
PAIRS += [("adabin", {}, "adabin", {}), ("full_precision", {}, "adabin", {}), ("full_precision", {}, "xnor", {})]
PAIRS += [("tbn", {}, "ttq", {}), ("abc_net", {}, "abc_net", {})]
PAIRS += [("dorefa", {"bits": bits}, "dorefa", {"bits": bits}) for bits in (1, 2, 3)]


LATER = {"recu", "ovsw", "biper", "fda", "progressive", "lsq", "dsq"}
"""Whose codes are made as those of others are."""
CASES = [pytest.param(*pair, marks=pytest.mark.full if LATER & {pair[0], pair[2]} else ()) for pair in PAIRS]


@pytest.mark.parametrize(("inputs", "input_options", "kernel", "kernel_options"), CASES)
def test_every_quantizer_gives_the_same_integers(inputs, input_options, kernel, kernel_options):
    model = Layer(
        make_quantizer(ACTIVATION_QUANTIZERS, inputs, **input_options),
        make_quantizer(WEIGHT_QUANTIZERS, kernel, **kernel_options),
    )
    images = images_of((5, 6, 37), batch=1)
    variables = initialized(model, (5, 6, 37))
    found = compare(model, variables, freeze(model, variables, (5, 6, 37)), images)
    assert found.same, found
    assert (found.values == 0) == (inputs == "full_precision")


@pytest.mark.parametrize("pad_value", [-1, 1])
@pytest.mark.parametrize("inputs", ["ste_sign", "decoupled", "tbn"])
def test_padding_by_a_code(pad_value, inputs):
    model = Layer(make_quantizer(ACTIVATION_QUANTIZERS, inputs), binary(), pad_value)
    images = images_of((5, 6, 3), batch=1)
    variables = initialized(model, (5, 6, 3))
    found = compare(model, variables, freeze(model, variables, (5, 6, 3)), images)
    assert found.values > 50 and found.same, found


class ByShape(nn.Module):
    """A network whose second layer reads its size from the shape of its inputs, or is flattened by numbers."""

    depthwise: bool

    @nn.compact
    def __call__(self, x, *, train=False):
        signs = {"input_quantizer": "ste_sign", "kernel_quantizer": "binary"}
        x = BinaryConv(32, kernel_quantizer="binary", name="stem")(x)
        x = BatchNorm(name="norm")(BinaryConv(32, **signs, name="first")(x), train=train)
        if self.depthwise:
            groups = x.shape[-1]
            return BinaryConv(32, 3, **signs, feature_group_count=groups, name="second")(x).mean((1, 2))
        return BinaryDense(5, **signs, name="second")(x.reshape(-1, 4 * 4 * 32))


@pytest.mark.parametrize(
    ("depthwise", "reason"),
    [(True, "layer 'second' gets its size from the shape of its inputs"), (False, "cannot reshape array of shape")],
)
def test_a_network_that_reads_sizes_from_packed_words_is_refused(depthwise, reason):
    model = ByShape(depthwise)
    variables = random_variables(model, (4, 4, 3))
    text = rf"^`model` does not run where layers hand on packed words, 32 channels in each \({reason}.*; give the sizes"
    with pytest.raises(ValueError, match=text):
        freeze(model, variables, (4, 4, 3))


def test_a_network_without_quantized_weights_is_refused():
    model = Chained()
    variables = initialized(model, (6, 6, 3))
    with pytest.raises(ValueError, match=r"`model` \(=Chained\) has no layer with quantized weights"):
        freeze(model, variables, (6, 6, 3))


def test_weights_that_are_real_in_evaluation_are_refused_with_the_layer():
    model = Chained(make_quantizer(WEIGHT_QUANTIZERS, "binary_connect", stochastic=True))
    variables = jax.eval_shape(lambda x: model.init(jax.random.key(0), x, train=False), jnp.zeros((1, 6, 6, 3)))
    with pytest.raises(ValueError, match="kernel quantizer of layer 'conv1' evaluates with real weights"):
        packed_structure(model, (6, 6, 3))
    assert variables


def test_a_quantizer_without_one_threshold_is_refused_with_the_layer():
    near_zero = stateless(lambda x: Quantized(jnp.where(jnp.abs(x) < 1, 1.0, -1.0), jnp.ones(())))
    model = Chained(binary(), input_quantizer=near_zero)
    variables = initialized(model, (6, 6, 3))
    with pytest.raises(ValueError, match="quantizer of layer 'conv2' has more than one threshold in channel 0; use"):
        freeze(model, variables, (6, 6, 3))


class PooledCodes(nn.Module):
    """conv -> BN -> max pool -> conv."""

    input_quantizer: object

    @nn.compact
    def __call__(self, x, *, train=False):
        x = BinaryConv(32, input_quantizer="ste_sign", kernel_quantizer="binary", name="conv1")(x, train=train)
        x = max_pool(BatchNorm(name="norm")(x, train=train))
        quantizers = {"input_quantizer": self.input_quantizer, "kernel_quantizer": "binary"}
        return BinaryConv(8, **quantizers, name="conv2")(x, train=train).mean((1, 2))


@pytest.mark.full
def test_the_code_of_a_maximum_is_the_lower_one_where_the_quantizer_falls():
    model = PooledCodes(lambda x: ste_sign(-x))
    variables, images = random_variables(model, (8, 8, 33), mean=0.0), images_of((8, 8, 33), batch=9)
    frozen = freeze(model, variables, (8, 8, 33))
    np.testing.assert_array_equal(model.apply(frozen, images), model.apply(variables, images))


@pytest.mark.full
def test_a_quantizer_that_falls_behind_a_max_pool_by_what_it_has_learned_is_refused():
    """With a positive slope it rises; gains of both signs."""
    quantize = lambda x, slope: Quantized(jnp.where(x * slope < 0, -1.0, 1.0), jnp.ones(()))
    model = PooledCodes(Quantizer(quantize, init=lambda key, x: {"slope": jnp.ones(x.shape[-1:])[None, None, None]}))
    variables, images = adversarial(initialized(model, (8, 8, 33))), images_of((8, 8, 33), batch=9)
    frozen = freeze(model, variables, (8, 8, 33))
    assert "threshold" in frozen["packed"]["norm"]
    np.testing.assert_array_equal(model.apply(frozen, images), model.apply(variables, images))
    learned = variables["params"]["conv2"]["input_quantizer"]
    learned["slope"] = learned["slope"].at[..., 5].set(-2.0)
    reason = "of layer 'conv2' falls behind a max pool in channel 5; use one that rises once$"
    with pytest.raises(ValueError, match=reason):
        freeze(model, variables, (8, 8, 33))


def test_verify_sees_a_flipped_bit():
    """The check can fail: one weight's bit, one threshold."""
    model = Chained(binary())
    images = images_of((6, 6, 3))
    variables = adversarial(initialized(model, (6, 6, 3)))
    frozen = freeze(model, variables, (6, 6, 3))
    base = frozen["packed"]["conv2"]["kernel"].bases[0]
    words = base.words.at[0, 0, 0].set(base.words[0, 0, 0] ^ 1)
    kernel = frozen["packed"]["conv2"]["kernel"]
    flipped = type(kernel)((type(base)(words, base.scale, base.values, base.constant),), kernel.shape, kernel.integers)
    changed = {"packed": frozen["packed"] | {"conv2": {"kernel": flipped}}}
    assert verify(model, variables, frozen, [images, images]).passed
    found = verify(model, variables, changed, [images])
    assert not found.passed and found.layers["conv2"].differing_integers > 0
    assert found.layers["conv1"].differing_integers == found.layers["head"].differing_integers == 0


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
@pytest.mark.full
def test_layers_of_float64_are_frozen(dtype, standard_dtypes):
    """Also on images of float32, to which what they return is rounded."""
    with jax.enable_x64(True):
        model = Half(dtype=jnp.float64)
        images = jnp.asarray(np.random.default_rng(0).normal(size=(32, 24)), dtype)
        model = model.copy(inputs=dtype)
        variables = model.init(jax.random.key(0), images)
        frozen = freeze(model, variables, (24,))
        assert frozen["packed"]["head"]["kernel"].shape == (10, 4)
        assert verify(model, variables, frozen, [images]).passed
