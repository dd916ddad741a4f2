"""Configs of things that are in no table: by name, by the thing itself, in memory alone."""

import json
from dataclasses import replace

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from small_sets import brightness_set

from bnn_jax.errors import UsageError
from bnn_jax.estimators import make_sign
from bnn_jax.layers import BinaryConv
from bnn_jax.losses import LOSSES, Loss, cross_entropy, multiclass_hinge
from bnn_jax.models import LeNet, ModelEntry
from bnn_jax.models.build import build_model, settings_taken
from bnn_jax.names import IN_MEMORY
from bnn_jax.optim import OPTIMIZERS, as_optimizer, latent_box, make_optimizer
from bnn_jax.schedules import constant
from bnn_jax.training.config import Config, ModelConfig, OptimConfig, from_dict, load_config, select_optimizer, to_dict
from bnn_jax.training.experiment import ImageInfo, make_experiment
from bnn_jax.training.loop import train
from bnn_jax.training.overrides import settled
from bnn_jax.training.programs import make_programs
from bnn_jax.training.resuming import differing_key
from bnn_jax.training.step import init_state, train_step
from bnn_jax.training.validation import validate

ADAM = OptimConfig("adam", 0.1)
gauss_sign = make_sign(lambda x: jnp.exp(-x * x))


class Own(nn.Module):
    num_classes: int = 10
    width: int = 4
    kernel_quantizer: object = "xnor"
    blocks: tuple[int, ...] = (1,)

    @nn.compact
    def __call__(self, x):
        x = BinaryConv(self.width, input_quantizer="ste_sign", kernel_quantizer=self.kernel_quantizer)(x)
        return nn.Dense(self.num_classes)(x.mean((1, 2)))


def make_own(num_classes, **settings):
    return Own(num_classes, **settings)


def config_of(**model):
    return Config("test", epochs=1, batch_size=8, loss="cross_entropy", model=ModelConfig(**model), optim=ADAM)


HERE = f"{__name__}:"
NETWORKS = {"class": Own, "function": make_own, "entry": ModelEntry(Own, kernel_quantizer="binary")}


def test_things_become_names_that_find_them():
    config = replace(
        config_of(name=Own, kernel_quantizer=gauss_sign, kernel_quantizer_options={}),
        loss=LOSSES["multiclass_hinge"],
        optim=replace(ADAM, name=optax.lion),
    )
    found = validate(config)
    assert (found.model.name, found.loss, found.optim.name) == (f"{HERE}Own", "multiclass_hinge", "optax:lion")
    assert found.model.kernel_quantizer == f"{HERE}gauss_sign" and found.model.input_quantizer is None
    assert validate(from_dict(json.loads(json.dumps(to_dict(found))))) == found
    assert validate(replace(found, loss=multiclass_hinge)).loss == "bnn_jax:multiclass_hinge"
    with_option = config_of(name="resnet6", kernel_quantizer="xnor", kernel_quantizer_options={"estimator": gauss_sign})
    assert validate(with_option).model.kernel_quantizer_options == {"estimator": f"{HERE}gauss_sign"}


def test_an_entry_of_ones_own_has_its_published_quantizers():
    entry = ModelEntry(Own, None, gauss_sign)
    found = validate(config_of(name=entry))
    assert found.model.kernel_quantizer == f"{HERE}gauss_sign" and found.model.name is entry
    kept = replace(found, optimizers=(replace(ADAM, name=optax.lion), ADAM))
    assert select_optimizer(validate(kept), "lion").name == "optax:lion"


def test_a_network_gets_what_is_set_and_keeps_what_is_its_own():
    assert build_model(Own, num_classes=3) == Own(3)
    assert build_model(f"{HERE}Own", num_classes=3, width=8, options={"blocks": 2}) == Own(3, 8, blocks=(2,))
    assert build_model(Own, num_classes=3, kernel_quantizer="full_precision").kernel_quantizer is None
    assert build_model(make_own, num_classes=3, width=8).width == 8
    assert build_model(Own(7), num_classes=3) == Own(7)
    assert build_model(lambda: Own(7), num_classes=3) == Own(7)
    assert build_model(LeNet, num_classes=3).kernel_quantizer is None
    assert build_model(ModelEntry(Own, None, "binary"), num_classes=3).kernel_quantizer.code_set == (-1, 1)
    assert settings_taken(make_own) is None and settings_taken(Own(7)) == set()


@pytest.mark.parametrize(
    ("model", "sentence"),
    [
        (
            {"name": Own, "input_quantizer": "rsign"},
            r"`model.input_quantizer` \(='rsign'\) is not an option of Own; leave",
        ),
        ({"name": Own, "options": {"block": 2}}, r"`model.options` \(='block'\) is not known; did you mean 'blocks'"),
        (
            {"name": Own(7), "width": 8},
            r"`model.width` \(=8\) is for what makes a network, and this Own is made; leave",
        ),
        ({"name": Own(7, blocks=[1])}, r"`model.name` \(='Own'\) must have tuples in the place of lists and dicts"),
        ({"name": 3}, r"`model.name` \(='int'\) must be a name, a module of flax.linen, its class or a function that"),
        ({"name": "optax:adam"}, r"adam cannot be made: adam\(\) missing 1 required positional argument"),
        (
            {"name": "builtins:dict"},
            r"`model.name` \(='dict'\) must be a name, a module of flax.linen, its class",
        ),
        ({"name": Own, "input_scaling": True}, r"`model.input_scaling` \(=True\) is not an option of Own; turn it off"),
        (
            {"name": "no_such_package.nets:Own"},
            r"`model.name` \(='no_such_package.nets:Own'\) cannot be imported: there",
        ),
        (
            {"name": "resnet6", "kernel_quantizer": "math:pi"},
            "math:pi cannot be made: `kernel_quantizer` .* must be a na",
        ),
    ],
)
def test_what_does_not_go_together_is_one_sentence(model, sentence):
    with pytest.raises(UsageError, match=sentence):
        validate(config_of(**model))


def test_a_thing_without_a_name_is_for_this_process_alone():
    """It trains here; its record says what it is, and refuses where it would have to be made again."""
    config = validate(config_of(name=lambda num_classes: Own(num_classes, 2)))
    assert callable(config.model.name) and validate(config_of(name=Own(3))).model.name == Own(3)
    info = ImageInfo((6, 6, 1), 10, (0.0,), (1.0,))
    programs = make_programs(config, info, examples=8)
    kernel = programs.init.eval_shape(0).params["BinaryConv_0"]["latent_kernel"]
    assert kernel.shape == (3, 3, 1, 2)
    recorded = to_dict(config)
    assert recorded["model"]["name"].startswith(IN_MEMORY) and recorded == to_dict(config)
    with pytest.raises(UsageError, match=r"`model.name` .*lambda.* was given as an object that no import finds again"):
        validate(from_dict(recorded))


def test_a_config_file_names_what_it_makes(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(
        "from bnn_jax import LOSSES\n"
        "from bnn_jax.models import LeNet\n"
        "from bnn_jax.training.config import Config, ModelConfig, OptimConfig\n"
        "class Net(LeNet):\n    pass\n"
        "def get_config():\n"
        "    kernels = {'estimator': lambda x: x}\n"
        "    model = ModelConfig(Net(10, width=3), kernel_quantizer_options=kernels)\n"
        "    others = (OptimConfig(name='adam', options={'f': Net}),)\n"
        "    return Config('mine', 1, 8, loss=LOSSES['cross_entropy'], model=model, optimizers=others)\n"
    )
    config = load_config(path)
    made = f"{path}:get_config()."
    assert (config.model.name, config.loss) == (f"{made}model.name", f"{made}loss")
    assert config.model.kernel_quantizer_options == {"estimator": f"{made}model.kernel_quantizer_options.estimator"}
    assert config.optimizers[0].options == {"f": f"{path}:Net"}
    assert build_model(config.model.name, num_classes=10).width == 3
    assert (
        validate(replace(config, model=ModelConfig(config.model.name), optimizers=(), optim=ADAM)).loss == config.loss
    )
    path.write_text("1 / 0\n")
    with pytest.raises(UsageError, match=r"`--config` \(=.*mine.py\) cannot be run: ZeroDivisionError: .* line 1\)"):
        load_config(path)


@pytest.mark.parametrize(
    "optimizer", ["optax:lion", optax.lion, optax.lion(0.1)], ids=["name", "function", "transform"]
)
def test_optimizers_of_optax(optimizer, standard_dtypes):
    """Lion's first step is the sign of the gradient, and its own decay of 1e-3; the box holds for latent weights."""
    params = {"conv": {"latent_kernel": jnp.array([0.95, 0.0])}, "head": {"kernel": jnp.array([1.0])}}
    gradients = {"conv": {"latent_kernel": jnp.array([-2.0, 3.0])}, "head": {"kernel": jnp.array([-0.1])}}
    made = make_optimizer(optimizer, learning_rate=constant(0.1, 1), weight_decay=0.2, box=latent_box())
    updates, _ = made.update(gradients, made.init(params), params, value=jnp.array(1.0))
    after = optax.apply_updates(params, updates)
    assert after["conv"]["latent_kernel"].tolist() == pytest.approx([1.0, -0.1])
    assert after["head"]["kernel"].tolist() == pytest.approx([1 - 0.1 * (1 + 1e-3)])
    assert as_optimizer(OPTIMIZERS["dfw"]).exact_step


def test_an_optimizer_of_ones_own_needs_a_learning_rate():
    before = config_of(name="resnet6")
    after = replace(before, optim=replace(before.optim, name="optax:lion"))
    with pytest.raises(UsageError, match=r"`optim.name` \(='optax:lion'\) has no settings in the config"):
        settled(before, after, {"optim.name"})
    with pytest.raises(UsageError, match=r"`optim.momentum` \(=0.5\) is for the table's; give its own among the"):
        validate(replace(after, optim=replace(after.optim, momentum=0.5)))
    own = validate(replace(before, optim=OptimConfig("optax:sgd", 0.1, options={"momentum": 0.5})))
    assert own.optim.options == {"momentum": 0.5}
    options = replace(after.optim, options={"b3": 0.9})
    with pytest.raises(UsageError, match=r"`optim.options` \(='b3'\) is not known; did you mean 'b[12]'"):
        validate(replace(after, optim=options))


def bell(slope):
    return make_sign(lambda x: slope * jnp.exp(-x * x))


OF_SLOPE = {
    "estimator": lambda config, slope: replace(
        config, model=replace(config.model, kernel_quantizer_options={"estimator": bell(slope)})
    ),
    "loss": lambda config, slope: replace(config, loss=lambda logits, labels: slope * cross_entropy(logits, labels)),
    "transform": lambda config, slope: replace(config, optim=OptimConfig(optax.sgd(0.1 * slope))),
    "network": lambda config, slope: replace(
        config, model=ModelConfig(lambda num_classes: Own(num_classes, int(4 * slope)))
    ),
}


@pytest.mark.parametrize("kind", OF_SLOPE)
def test_another_thing_without_a_name_is_another_run(kind, tmp_path):
    """The same made anew is the same run; the folder of another is refused, however alike they are called."""
    config = config_of(name="resnet6", width=4, kernel_quantizer="xnor")
    one, again, other = (validate(OF_SLOPE[kind](config, slope)) for slope in (1.0, 1.0, 2.0))
    assert differing_key(one, again) is None
    assert differing_key(one, other) is not None and differing_key(from_dict(to_dict(one)), other) is not None
    assert differing_key(from_dict(to_dict(one)), again) is None


@pytest.mark.full
def test_a_finished_run_is_not_that_of_another_thing(tmp_path):
    dataset, config = brightness_set(32, 10, 10), config_of(name="resnet6", width=4, kernel_quantizer="xnor")
    result = train(OF_SLOPE["loss"](config, 1.0), tmp_path, data=dataset)
    assert train(OF_SLOPE["loss"](config, 1.0), tmp_path, data=dataset) == result
    with pytest.raises(UsageError, match=r"`loss` is '.*contents .*' now, but .* holds a run with '.*contents .*'"):
        train(OF_SLOPE["loss"](config, 2.0), tmp_path, data=dataset)


def test_a_made_transform_has_a_rate_of_its_own():
    config = replace(config_of(name="resnet6"), optim=OptimConfig(optax.sgd(0.1)))
    for setting, value in (("learning_rate", 0.5), ("schedule", "cosine"), ("warmup_share", 0.1)):
        rule = (
            rf"`optim.{setting}` \(={value!r}\) is for what makes an optimizer, and this one is made; give the function"
        )
        with pytest.raises(UsageError, match=rule):
            validate(replace(config, optim=replace(config.optim, **{setting: value})))
    experiment = make_experiment(validate(config), ImageInfo((8, 8, 1), 10, (0.5,), (0.5,)), total_steps=4)
    assert experiment.learning_rate is None
    images, labels = jnp.zeros((8, 8, 8, 1), jnp.uint8), jnp.zeros(8, jnp.int32)
    step = lambda state: train_step(experiment, state, images, labels)[1]
    metrics = jax.eval_shape(lambda: step(init_state(experiment, 0)))
    assert "loss" in metrics and "learning_rate" not in metrics


def test_inner_steps_are_for_the_losses_whose_pieces_are_known():
    config = replace(config_of(name="resnet6"), optim=OptimConfig("dfw", inner_steps=3))
    for loss in ("multiclass_hinge", multiclass_hinge, "smoothed_multiclass_hinge"):
        assert validate(replace(config, loss=loss))
    own = Loss(lambda logits, labels: 3 * multiclass_hinge(logits, labels), piecewise_linear=True)
    assert validate(replace(config, loss=own, optim=OptimConfig("dfw")))
    with pytest.raises(
        UsageError, match=r"`optim.inner_steps` \(=3\) does not go with a loss of your own, whose linear"
    ):
        validate(replace(config, loss=own))


def test_arrays_among_options_are_tuples():
    at = {"at_shares": np.array([0.5, 0.75])}
    config = replace(
        config_of(name="resnet6"), optim=OptimConfig("adam", 0.1, schedule="milestones", schedule_options=at)
    )
    found = validate(config)
    assert found.optim.schedule_options == {"at_shares": (0.5, 0.75)}
    assert validate(from_dict(to_dict(config))) == found


def test_a_run_refuses_a_loss_that_is_not_of_each_example():
    config = replace(config_of(name="resnet6"), loss=lambda logits, labels: cross_entropy(logits, labels).mean())
    with pytest.raises(UsageError, match=r"^`loss` \(=<lambda>.*\) must return one loss for each example"):
        make_programs(validate(config), ImageInfo((8, 8, 1), 10, (0.5,), (0.5,)), examples=64)


def test_an_exact_step_needs_a_loss_that_is_known_to_be_piecewise_linear():
    config = replace(config_of(name="resnet6"), optim=OptimConfig("dfw"))
    for loss in (multiclass_hinge, "bnn_jax:multiclass_hinge"):
        assert validate(replace(config, loss=loss))
    with pytest.raises(UsageError, match="does not go with dfw, whose step size is exact for a piecewise linear loss"):
        validate(replace(config, loss=lambda logits, labels: cross_entropy(logits, labels)))
