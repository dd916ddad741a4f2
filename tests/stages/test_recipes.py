"""Recipes: the papers' settings stage by stage, that networks and teachers fit, and a miniature run of each."""

import json
import re
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from run_script import run_script
from small_sets import brightness_set

from bnn_jax.errors import UsageError
from bnn_jax.optim import decay_of_parameters
from bnn_jax.optim.frozen import path_name
from bnn_jax.stages.recipes import RECIPES, bnn_plus
from bnn_jax.stages.stage import check_stages, run_stages
from bnn_jax.stages.teachers import load_network
from bnn_jax.stages.warm_start import by_name
from bnn_jax.training.config import Config, ModelConfig, OptimConfig
from bnn_jax.training.experiment import ImageInfo, make_experiment, make_model
from bnn_jax.training.metrics import read_metrics
from bnn_jax.training.programs import initial_state, programs_of
from bnn_jax.training.step import init_state, train_step

TINY = ModelConfig("resnet6", width=4, options={"stage_sizes": (1,)})
OWN_NETWORK = {  # where a width of 4 needs another option, or the recipe more stages
    "real_to_binary": ModelConfig("real_to_binary_resnet18", width=4, options={"stage_sizes": (1,), "reduction": 2}),
    "stompp": ModelConfig("resnet6", width=4, options={"stage_sizes": (1, 1)}),
}
INFO = ImageInfo((8, 8, 1), 3, (120.0,), (60.0,))
REAL, SIGN = "full_precision", "approx_sign"
EXPECTED = {
    # name: inputs, kernels, initialise_from, teacher, epochs of 120
    "bireal": {
        "relu": (REAL, REAL, None, None, 120),
        "leaky_clip": (REAL, REAL, "relu", None, 120),
        "clip": (REAL, REAL, "leaky_clip", None, 120),
        "binary": (SIGN, "magnitude_aware", "clip", None, 120),
        "norm": (SIGN, "binary", "binary", None, 6),
    },
    "reactnet": {
        "teacher": (REAL, REAL, None, None, 120),
        "inputs": ("rsign", REAL, None, "teacher", 120),
        "binary": ("rsign", "magnitude_aware", "inputs", "teacher", 120),
    },
    "real_to_binary": {
        "real": (REAL, REAL, None, None, 120),
        "tanh": (REAL, REAL, None, "real", 90),
        "inputs": ("ste_sign", REAL, None, "tanh", 90),
        "binary": ("ste_sign", "binary", "inputs", "inputs", 90),
    },
    "dir_net": {
        "real": (REAL, REAL, None, None, 120),
        "binary": ("ede_sign", "dir_net", None, "real", 120),
    },
    "dgrl": {
        "real": (REAL, REAL, None, None, 120),
        "binary": (SIGN, "magnitude_aware", None, "real", 120),
    },
    "ttq": {
        "real": (REAL, REAL, None, None, 120),
        "ternary": (REAL, "ttq", "real", None, 120),
    },
    "inq": {
        "real": (REAL, REAL, None, None, 120),
        "powers": (REAL, "inq", "real", None, 120),
    },
    "bnn_plus": {
        "real": (REAL, REAL, None, None, 120),
        "binary": ("swish_sign", "bnn_plus", "real", None, 50),
    },
    "s2_bnn": {
        "teacher": (REAL, REAL, None, None, 120),
        "inputs": (SIGN, REAL, None, "teacher", 120),
        "binary": (SIGN, "magnitude_aware", "inputs", "teacher", 120),
        "probe": (SIGN, "magnitude_aware", "binary", None, 60),
    },
    "binaryduo": {
        "coupled": ("coupled", "dorefa", None, None, 120),
        "decoupled": ("decoupled", "dorefa", "coupled", None, 40),
    },
    "rbnn": {"binary": ("rbnn", "rbnn", None, None, 120)},
    "biper": {
        "periodic": ("recu", "biper", None, None, 120),
        "binary": ("recu", "biper", "periodic", None, 60),
    },
    "stompp": {
        "stage1": ("progressive", "progressive", None, None, 120),
        "stage2": ("progressive", "progressive", "stage1", None, 120),
    },
}


def steps(rate, *milestones, factor=0.1):
    return lambda epoch: rate * factor ** sum(epoch >= milestone for milestone in milestones)


def r2b_step_schedule(rate):
    """`R2BStepSchedule` of larq zoo with its decay_fraction 0.3."""
    return lambda epoch: rate * epoch / 5 if epoch <= 5 else rate * 0.3 ** np.searchsorted([40, 60, 70], epoch)


def inq_solver(epoch):
    """Caffe's policy "step", from the start of each of four runs of 63,000 steps."""
    return 0.003 * 0.2 ** np.floor(epoch % 63 / 15)


def warmed_up(rate, epochs):
    """`lr * (epoch + 1) / 5` before epoch 4, `CosineAnnealingLR` with `T_max` four less behind it."""
    return lambda e: rate * (0.2 + 0.2 * e if e < 4 else (1 + np.cos(np.pi * (e - 4) / (epochs - 4))) / 2)


COUPLED, NESTEROV = {"decoupled": False}, {"nesterov": True}
RESNET = (64, steps(0.1, 32, 48), ("sgd", {}), (1e-4, 0, ()))  # He et al., 2016, section 4.2
FINE = (20, steps(0.01, 10, 15), ("sgd", {}), (0, 0, ()))
R2B_DECAY = (2e-5, 0, ("st*kernel",))
TTQ_LEVELS = ("*kernel", "*positive_scale", "*negative_scale")
IR_NET = (400, lambda e: 0.05 * (1 + np.cos(np.pi * e / 400)), ("sgd", {}), (1e-4, 1e-4, ()))
REACTNET = (128, lambda e: 2.5e-3 * (1 - e / 128), ("adam", COUPLED))
STOMPP = (10, lambda e: 0.05 * (1 + np.cos(np.pi * e / 10)), ("sgd", {}), (0, 0, ()))
S2_BNN = (200, lambda e: 3e-4 * (1 - e / 200), ("adam", COUPLED), (0, 0, ()))
SOURCES = {
    # epochs there, rate by epoch, optimizer, decay of real and latent weights and of which; sources in docs/recipes.md
    "bireal/relu": RESNET,
    "bireal/leaky_clip": FINE,
    "bireal/clip": FINE,
    "bireal/binary": FINE,
    "bireal/norm": (1, lambda e: 0.01, ("sgd", {}), (0, 0, ())),
    "reactnet/teacher": RESNET,
    "reactnet/inputs": (*REACTNET, (1e-5, 0, ("st*kernel", "*shift"))),
    "reactnet/binary": (*REACTNET, (0, 0, ())),
    "real_to_binary/real": RESNET,
    "real_to_binary/tanh": (75, r2b_step_schedule(1e-3), ("adam", COUPLED), R2B_DECAY),
    "real_to_binary/inputs": (75, r2b_step_schedule(1e-3), ("adam", COUPLED), R2B_DECAY),
    "real_to_binary/binary": (75, r2b_step_schedule(2e-4), ("adam", COUPLED), (0, 0, ())),
    "dir_net/real": IR_NET,
    "dir_net/binary": IR_NET,
    "dgrl/real": RESNET,
    "dgrl/binary": RESNET,
    "ttq/real": (400, steps(0.1, 82, 123, 150), ("sgd", {}), (2e-4, 2e-4, ("*kernel",))),
    "ttq/ternary": (400, steps(0.1, 82, 123, 150), ("sgd", {}), (2e-4, 2e-4, TTQ_LEVELS)),
    "inq/real": RESNET,
    "inq/powers": (252, inq_solver, ("sgd", {}), (5e-4, 5e-4, ("*kernel",))),
    "bnn_plus/real": (120, steps(0.1, 30, 60, 90), ("sgd", {}), (1e-4, 0, ())),
    "bnn_plus/binary": (50, steps(1e-3, 10, 20, 30, 40), ("adam", COUPLED), (0, 0, ())),
    "s2_bnn/teacher": RESNET,
    "s2_bnn/inputs": S2_BNN,
    "s2_bnn/binary": S2_BNN,
    "s2_bnn/probe": (100, steps(0.1, 60, 80), ("sgd", {}), (0, 0, ())),
    "binaryduo/coupled": (120, steps(0.1, 70, 90, 110), ("sgd", NESTEROV), (1e-4, 1e-4, ())),
    "rbnn/binary": (1000, warmed_up(0.1, 1000), ("sgd", {}), (1e-4, 1e-4, ())),
    "biper/periodic": (600, warmed_up(0.021, 600), ("sgd", {}), (1.6e-3, 1.6e-3, ())),
    "biper/binary": (300, warmed_up(3.7e-3, 300), ("sgd", {}), (1.6e-4, 1.6e-4, ())),
    "stompp/stage1": STOMPP,
    "stompp/stage2": STOMPP,
    "binaryduo/decoupled": (40, steps(0.01, 20, 30, 35), ("sgd", NESTEROV), (1e-4, 1e-4, ())),
}
DISTILLED = {
    "reactnet": {"inputs": ({"distribution": 1.0}, 0.0), "binary": ({"distribution": 1.0}, 0.0)},
    "real_to_binary": {
        "tanh": ({"attention_mse": 30.0, "knowledge": 3.0}, 1.0),
        "inputs": ({"attention_mse": 30.0, "knowledge": 3.0}, 1.0),
        "binary": ({"knowledge": 0.8}, 1.0),
    },
    "dir_net": {"binary": ({"standardized": 1.0}, 1.0)},
    "dgrl": {"binary": ({"features": 1.0}, 1.0)},
    "s2_bnn": {"inputs": ({"embedding": 1.0}, 0.0), "binary": ({"embedding": 1.0}, 0.0)},
}


def base(recipe, epochs):
    model = OWN_NETWORK.get(recipe, TINY)
    return Config("test", epochs=epochs, batch_size=16, model=model, optim=OptimConfig("dfw"), scan_steps=2)


@pytest.mark.parametrize("recipe", RECIPES)
def test_the_settings_are_the_papers(recipe):
    stages = RECIPES[recipe](base(recipe, 120))
    check_stages(stages)
    found = {
        stage.name: (
            stage.config.model.input_quantizer,
            stage.config.model.kernel_quantizer,
            stage.initialise_from,
            stage.teacher,
            stage.config.epochs,
        )
        for stage in stages
    }
    assert found == EXPECTED[recipe]
    taught = {
        stage.name: (stage.config.distillation.losses, stage.config.distillation.label_weight)
        for stage in stages
        if stage.teacher
    }
    assert taught == DISTILLED.get(recipe, {})
    boxes = {stage.name for stage in stages if stage.config.optim.latent_box is not None}
    assert boxes == ({"binary"} if recipe == "real_to_binary" else set())
    assert all(stage.config.epochs == 1 for stage in RECIPES[recipe](base(recipe, 1)))


def stage_of(name, base_of=base):
    recipe, _, stage = name.partition("/")
    return next(found for found in RECIPES[recipe](base_of(recipe, 120)) if found.name == stage)


def test_every_stage_has_a_source():
    assert set(SOURCES) == {f"{recipe}/{stage}" for recipe, stages in EXPECTED.items() for stage in stages}


@pytest.mark.parametrize("name", SOURCES)
def test_rates_and_decays_are_those_of_the_sources(name):
    """In the middle of each tenth of each of the source's epochs, but for the steps at which it changes epoch."""
    epochs, rate, (optimizer, options), decays = SOURCES[name]
    config = stage_of(name).config
    optim = config.optim
    assert (optim.name, optim.options, optim.momentum) == (optimizer, options, 0.9)
    assert (optim.weight_decay, optim.latent_weight_decay, optim.decay_only) == decays
    experiment = make_experiment(config, INFO, total_steps=10 * epochs)
    found = np.asarray(jax.vmap(experiment.learning_rate)(jnp.arange(10 * epochs)))
    between = np.arange(10 * epochs) % 10 > 0
    expected = np.array([rate(step / 10) for step in range(10 * epochs)])
    np.testing.assert_allclose(found[between], expected[between], rtol=1e-4, atol=1e-7 * expected.max())


def test_rates_of_bireal_and_reactnet_are_the_networks_own():
    for name, rate in (("bireal18", 0.01), ("bireal34", 0.08)):
        stages = RECIPES["bireal"](replace(base("bireal", 2), model=ModelConfig(name)))
        assert [stage.config.optim.learning_rate for stage in stages] == [0.1, rate, rate, rate, 0.01]
    rates = {}
    for name, stem in (("reactnet_a", "imagenet"), ("reactnet18", "imagenet"), ("reactnet18_bn_free", "imagenet")):
        model = ModelConfig(name, options={} if name == "reactnet_a" else {"stem": stem})
        stages = RECIPES["reactnet"](replace(base("reactnet", 2), model=model))
        rates[name] = [stage.config.optim.learning_rate for stage in stages[1:]]
    assert rates == {"reactnet_a": [1.25e-3] * 2, "reactnet18": [2.5e-3] * 2, "reactnet18_bn_free": [5e-4] * 2}


def test_patterns_of_decay_leave_out_what_the_sources_leave_out():
    """Names of the parameters that are decayed, one of each kind, in the stages whose sources spare some."""

    def kinds(name, model):
        def base_of(recipe, epochs):
            return replace(base(recipe, epochs), model=model)

        stage = stage_of(name, base_of)
        experiment = make_experiment(stage.config, INFO, total_steps=4)
        params = jax.eval_shape(partial(init_state, experiment), jnp.uint32(0)).params
        optim = stage.config.optim
        found = decay_of_parameters(params, weight_decay=1.0, latent_weight_decay=2.0, decay_only=optim.decay_only)
        paths = {path_name(path): decay for path, decay in jax.tree_util.tree_leaves_with_path(found)}
        return {re.sub(r"stage\d_block\d/(\w+?)\d*(?=/)", r"\1", path): decay for path, decay in paths.items() if decay}

    kernels = {"stem/kernel": 1, "conv/latent_kernel": 2, "head/kernel": 1}
    levels = {f"conv/kernel_quantizer/{sign}_scale": 1 for sign in ("positive", "negative")}
    assert kinds("inq/powers", TINY) == kernels
    assert kinds("ttq/ternary", TINY) == kernels | levels
    reactnet = ModelConfig("reactnet_resnet20", width=4, options={"stage_sizes": (1, 1)})
    shifts = ("activation/input_shift", "activation/output_shift", "conv/input_quantizer/shift")
    real = dict.fromkeys(("stem/kernel", "conv/kernel", "downsample/kernel"), 1)
    assert kinds("reactnet/inputs", reactnet) == real | dict.fromkeys(shifts, 1)
    gated = replace(OWN_NETWORK["real_to_binary"], options={"stage_sizes": (1, 1), "reduction": 2})
    gates = {f"gate/{part}/kernel": 1 for part in ("squeeze", "expand")}
    assert kinds("real_to_binary/inputs", gated) == real | gates


def test_what_else_a_stage_is_known_by():
    stages = {recipe: {stage.name: stage for stage in make(base(recipe, 120))} for recipe, make in RECIPES.items()}
    activations = [stages["bireal"][name].config.model.options["activation"] for name in ("relu", "leaky_clip", "clip")]
    assert activations == ["relu", "leaky_clip", "clip"]
    assert stages["bireal"]["norm"].config.optim.train_only == ("*norm*",)
    assert stages["ttq"]["ternary"].transfer == "normalized"
    assert stages["binaryduo"]["decoupled"].transfer == "decoupled"
    probe = stages["s2_bnn"]["probe"]
    assert (probe.transfer, probe.which, probe.config.optim.train_only) == ("without_head", "last", ("head/*",))
    assert stages["s2_bnn"]["binary"].config.distillation.temperature == 0.2
    drawn = stages["bnn_plus"]["binary"].config
    assert (drawn.regularizer, drawn.regularizer_strength) == ("manhattan", 1e-6)
    assert drawn.model.kernel_quantizer_options == {"beta": 5.0, "initial": "median"}
    falling = replace(
        base("bnn_plus", 2), regularizer="l2", regularizer_strength=0.1, regularizer_schedule="exponential"
    )
    drawn = bnn_plus(replace(falling, regularizer_schedule_options={"final_share": 1e-6}))[1].config
    kept = (drawn.regularizer_strength, drawn.regularizer_schedule, drawn.regularizer_schedule_options)
    assert kept == (1e-6, "constant", {})
    second = bnn_plus(base("bnn_plus", 2), regularizer="euclidean")[1].config
    assert (second.regularizer, second.model.kernel_quantizer_options["initial"]) == ("euclidean", "mean")


def test_stompp_goes_from_the_input_to_the_output():
    stages = RECIPES["stompp"](replace(base("stompp", 2), model=ModelConfig("bireal18", width=4)))
    turns = [
        {pattern: own["kernel_quantizer"].split(":")[1] for pattern, own in stage.config.model.quantizers.items()}
        for stage in stages
    ]
    assert turns[0] == dict.fromkeys((f"stage{n}_*/conv*" for n in (2, 3, 4)), "clipped")
    assert turns[2] == {f"stage{n}_*/conv*": {4: "clipped"}.get(n, "committed") for n in (1, 2, 4)}
    for stage in stages:
        model = make_model(stage.config.model, num_classes=3)
        shapes = flatten_dict(
            jax.eval_shape(partial(model.init, train=False), jax.random.key(0), jnp.zeros((1, 64, 64, 3)))
        )
        kernels = {path[-2]: set() for path in shapes if path[-1].endswith("kernel")}
        for path in shapes:
            if path[-1].endswith("kernel"):
                kernels[path[-2]].add(path[-1])
        assert (kernels["downsample"], kernels["conv1"]) == ({"kernel"}, {"latent_kernel"})
    assert [(stage.initialise_from, stage.which) for stage in stages[1:]] == [(f"stage{n}", "last") for n in (1, 2, 3)]


def test_a_network_of_the_recipes_family_is_taken_as_it_is():
    activations = ["relu", "leaky_clip", "clip"]
    model = ModelConfig("bireal18", width=4, options={"stage_sizes": (2, 2), "stem": "cifar", "trainable_slopes": True})
    stages = RECIPES["bireal"](replace(base("bireal", 2), model=model))
    assert {stage.config.model.name for stage in stages} == {"bireal18"}
    assert all(stage.config.model.options.items() >= model.options.items() for stage in stages)
    other = RECIPES["reactnet"](replace(base("bireal", 2), model=model))
    assert [stage.config.model.name for stage in other] == ["resnet20", "reactnet_resnet20", "reactnet_resnet20"]
    assert [stage.config.model.options["stage_sizes"] for stage in other] == [(1, 1), (2, 2), (2, 2)]
    assert {stage.config.model.options["stem"] for stage in other} == {"cifar"}
    large = ModelConfig("reactnet18_bn_free", width=4, options={"stem": "imagenet"})
    stages = RECIPES["reactnet"](replace(base("reactnet", 2), model=large))
    assert [(s.config.model.name, s.config.model.kernel_quantizer) for s in stages] == [
        ("resnet34", REAL),
        ("reactnet18_bn_free", REAL),
        ("reactnet18_bn_free", "bn_free"),
    ]
    assert {stage.config.model.options["stem"] for stage in stages} == {"imagenet"}
    bottlenecks = RECIPES["bireal"](replace(base("bireal", 2), model=ModelConfig("bireal50", width=8)))
    assert [make_model(stage.config.model, num_classes=3).activation for stage in bottlenecks[:3]] == activations
    extended = RECIPES["bnn_plus"](replace(base("bnn_plus", 2), model=ModelConfig("ebireal18", width=4)))
    assert {stage.config.model.name for stage in extended} == {"ebireal18"}


def networks(recipe, model):
    """The size of the network of each stage of a recipe."""
    stages = RECIPES[recipe](replace(base(recipe, 2), model=model))
    made = [make_model(stage.config.model, num_classes=3) for stage in stages]
    return [(network.width, network.stem, network.stage_sizes) for network in made]


BLOCKS, UNITS = (16, "cifar", (3, 3, 3)), (16, "cifar", (6, 6, 6))
SIZES = {
    "real_to_binary": [BLOCKS] * 4,
    "binaryduo": [BLOCKS] * 2,
    "reactnet": [BLOCKS, UNITS, UNITS],
    "dgrl": [UNITS] * 2,
    "bireal": [UNITS] * 5,
    "biper": [UNITS] * 2,
}


@pytest.mark.parametrize("recipe", SIZES)
def test_width_stem_and_depth_are_those_of_the_configs_network(recipe):
    """Given or published, as many convolutions in each stage where one network counts blocks, another units."""
    model = ModelConfig("resnet20")
    assert networks(recipe, model) == SIZES[recipe]
    written = ModelConfig("resnet20", width=16, options={"stage_sizes": (3, 3, 3), "stem": "cifar"})
    assert networks(recipe, written) == SIZES[recipe]
    units = ModelConfig("bireal_resnet20", options={"stage_sizes": [5, 6, 6]})
    assert {sizes for _, _, sizes in networks(recipe, units)} <= {(5, 6, 6), (3, 3, 3)}


def test_stage_sizes_of_another_kind_of_block_are_left_out():
    teacher, *_ = networks("reactnet", ModelConfig("reactnet_a", options={"stage_sizes": (1, 2, 2, 6, 2)}))
    assert teacher == (64, "imagenet", (3, 4, 6, 3))
    assert set(networks("dgrl", ModelConfig("bireal50"))) == {(64, "imagenet", (4, 4, 4, 4))}
    assert set(networks("bireal", ModelConfig("vgg_small", 8, options={"stage_sizes": 1}))) == {(8, "cifar", (6, 6, 6))}


def test_the_teacher_of_reactnet_is_deeper_unless_the_student_has_another_size():
    for options in ({}, {"stage_sizes": (4, 4, 4, 4)}):
        teacher, student, _ = networks("reactnet", ModelConfig("reactnet18", options=options))
        assert (teacher, student) == ((64, "imagenet", (3, 4, 6, 3)), (64, "imagenet", (4, 4, 4, 4)))
    assert networks("reactnet", ModelConfig("reactnet18", 4, options={"stage_sizes": 2}))[0] == (4, "imagenet", (1,))


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize(
    "settings", [{"quantizers": {"stem": "binary"}}, {"gradient_quantizer": "dorefa"}, {"input_scaling": True}]
)
def test_quantizers_that_recipes_do_not_read_are_refused(recipe, settings):
    ((setting, value),) = settings.items()
    shown = re.escape(repr(value))
    text = rf"^`model.{setting}` \(={shown}\) is not read by recipes, which set all quantizers themselves; leave it out"
    before = base(recipe, 2)
    with pytest.raises(UsageError, match=text):
        RECIPES[recipe](replace(before, model=replace(before.model, **settings)))


SHORT = ("ttq",)
"""Recipes that every test run trains in miniature."""


@pytest.mark.parametrize("recipe", [recipe for recipe in RECIPES if recipe not in SHORT])
def test_networks_teachers_and_predecessors_fit(recipe):
    """Traced, not compiled: every stage takes a step, and by names alone it finds nearly all of its predecessor."""
    variables, models = {}, {}
    images, labels = jnp.zeros((4, 8, 8, 1), jnp.uint8), jnp.zeros(4, jnp.int32)
    for stage in RECIPES[recipe](base(recipe, 2)):
        models[stage.name] = stage.config.model
        teacher = models.get(stage.teacher)
        experiment = make_experiment(stage.config, INFO, total_steps=4, learning_rate=0.1, teacher=teacher)
        state = jax.eval_shape(partial(init_state, experiment), jnp.uint32(0))
        after, metrics = jax.eval_shape(
            partial(train_step, experiment), state, images, labels, variables.get(stage.teacher)
        )
        assert jax.tree.map(lambda x: x.shape, after) == jax.tree.map(lambda x: x.shape, state)
        assert {f"distillation_{name}" for name in stage.config.distillation.losses} <= set(metrics)
        variables[stage.name] = {"params": state.params, **state.model_state}
        if stage.initialise_from is not None and stage.transfer != "decoupled":
            start = by_name(variables[stage.initialise_from], variables[stage.name])
            assert start.unused == ()
            assert all("quantizer" in name for name in start.initialised)


@pytest.fixture(scope="module")
def dataset():
    return brightness_set(48)


def assert_the_switch_preserves_the_function(stages, workdir, dataset):
    """The first step's loss of the decoupled network is that of the coupled one on the same images."""
    _, second = stages
    coupled = load_network(workdir / "coupled", dataset)
    programs = programs_of(second.config, dataset)
    batch = np.asarray(programs.epoch_permutation(initial_state(programs, second.config.seed).train.seed, np.int32(1)))[
        0
    ]
    x = (dataset.train.images[batch].astype(np.float32) - 120) / 60
    model = make_model(coupled.settings, num_classes=3)
    (logits, _), _ = model.apply(coupled.variables, jnp.asarray(x), train=True, progress=0.0, mutable=["batch_stats"])
    logits = np.asarray(logits, np.float64)
    expected = np.log(np.exp(logits).sum(1)) - logits[np.arange(16), dataset.train.labels[batch]]
    first = next(read_metrics(workdir / "decoupled" / "metrics.jsonl"))
    assert first["loss"] == pytest.approx(expected.mean(), rel=1e-5)


def assert_half_of_the_trained_weights_were_frozen_first(stages, workdir, dataset):
    """To powers of two below 4/3 of the largest trained weight, whatever the latent weights did after."""
    real = load_network(workdir / "real", dataset).variables["params"]
    kernel = np.abs(np.asarray(real["stage1_block1"]["conv1"]["kernel"]))
    powers = load_network(workdir / "powers", dataset, which="last").variables
    state = powers["quantizer_state"]["stage1_block1"]["conv1"]["kernel_quantizer"]
    assert int(state["exponent"]) == np.floor(np.log2(4 * kernel.max() / 3)) - 7
    assert np.asarray(state["frozen"])[kernel >= np.median(kernel)].all()


CHECKS = {
    "binaryduo": assert_the_switch_preserves_the_function,
    "inq": assert_half_of_the_trained_weights_were_frozen_first,
}


@pytest.mark.long
@pytest.mark.parametrize(
    "recipe", [pytest.param(recipe, marks=() if recipe in SHORT else pytest.mark.full) for recipe in RECIPES]
)
def test_every_recipe_runs_in_miniature(recipe, dataset, tmp_path):
    stages = RECIPES[recipe](base(recipe, 2))
    results = run_stages(stages, tmp_path, data=dataset)
    assert list(results) == [stage.name for stage in stages]
    for stage in stages:
        records = [r for r in read_metrics(tmp_path / stage.name / "metrics.jsonl") if r["kind"] == "train"]
        assert len(records) == 3 * stage.config.epochs
        assert all(np.isfinite(record["objective"]) for record in records)
        assert all({f"distillation_{name}" for name in stage.config.distillation.losses} <= set(r) for r in records)
        record = json.loads((tmp_path / stage.name / "stage.json").read_text())
        if stage.initialise_from is not None and stage.transfer in ("by_name", "normalized"):
            assert record["unused"] == []
            assert all("quantizer" in name for name in record["initialised"])
    CHECKS.get(recipe, lambda *_: None)(stages, tmp_path, dataset)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("reactnt",), "error: `recipe` (='reactnt') is not known; did you mean 'reactnet'?"),
        (("ttq", "--finished", "reel", "runs"), "error: `stage` (='reel') is not known; did you mean 'real'?"),
        (
            ("ttq", "--finished", "real", "/nowhere"),
            "error: `initialise_from` (='/nowhere') of stage 'ternary' must be",
        ),
        (
            ("bireal", "--finished", "clip", "/nowhere", "relu", "/before/it"),
            "error: `initialise_from` (='/nowhere') of stage 'binary' must be",
        ),
    ],
)
def test_the_script_says_what_is_wrong_in_one_sentence(arguments, message, tmp_path):
    done = run_script("train_stages", *arguments, "--workdir", tmp_path / "run", code=2)
    assert message in done.stderr
    assert not (tmp_path / "run").exists()


@pytest.mark.long
@pytest.mark.full
def test_the_script_tells_the_stages_and_their_results(tmp_path):
    """Once with both stages on the digits, then with the first one's folder in its place."""
    small = ("--epochs", "1", "--batch-size", "512", "--model.width", "4")
    done = run_script("train_stages", "ttq", "--workdir", tmp_path / "all", *small)
    assert "stage 1/2 real: starts from random weights" in done.stdout
    assert "stage 2/2 ternary: takes" in done.stdout
    assert len(re.findall(r"^(real|ternary): test accuracy \d+\.\d+ % at the last epoch", done.stdout, re.M)) == 2
    finished = ("--finished", "real", tmp_path / "all" / "real")
    again = run_script("train_stages", "ttq", "--workdir", tmp_path / "second", *finished, *small)
    assert "stage 1/1 ternary: takes" in again.stdout
    curves = [json.loads((tmp_path / f / "ternary" / "result.json").read_text())["curve"] for f in ("all", "second")]
    assert curves[0] == curves[1]
