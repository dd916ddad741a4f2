"""Configs: what is refused, with which words; overrides; the round trip through JSON."""

import dataclasses
import re
import runpy
from dataclasses import dataclass, replace
from operator import attrgetter
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

import bnn_jax
from bnn_jax.errors import UsageError
from bnn_jax.losses import multiclass_hinge, smoothed_multiclass_hinge
from bnn_jax.stages.stage import Stage, run_stages
from bnn_jax.training.config import (
    Config,
    DataConfig,
    ModelConfig,
    OptimConfig,
    Settings,
    from_dict,
    load_config,
    select_optimizer,
    to_dict,
)
from bnn_jax.training.experiment import ImageInfo, make_experiment
from bnn_jax.training.loop import train
from bnn_jax.training.overrides import parse
from bnn_jax.training.programs import make_programs
from bnn_jax.training.validation import validate

ROOT = Path(__file__).parents[2]
CONFIG = Config("test", epochs=2, batch_size=8, optimizers=(OptimConfig("adam", 0.01), OptimConfig("sgd", 0.1)))
FILES = sorted((ROOT / "configs").glob("*.py"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_every_config_is_valid_and_survives_json(path):
    config = load_config(path)
    assert from_dict(to_dict(config)) == config
    for optim in config.optimizers:
        validate(replace(config, optim=optim))
    get_rows = runpy.run_path(str(path)).get("get_rows", lambda config: {"only": (config, {})})
    for row, _ in get_rows(config).values():
        assert from_dict(to_dict(validate(row))) == validate(row)
    assert len({len(optim.tune) for optim in (*config.optimizers, config.optim)}) == 1
    header = path.read_text().split('"""')[1]
    assert "Paper:" in header
    assert "Command: bnn-jax " in header and f"--config {path.stem}" in header


def changed(**changes):
    config = CONFIG
    for key, value in changes.items():
        group, _, name = key.rpartition("__")
        config = replace(
            config, **({group: replace(getattr(config, group), **{name: value})} if group else {key: value})
        )
    return config


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"optim__name": "adamm"},
            r"`optim\.name` \(='adamm'\) is not known; did you mean 'adam'\? Choose one of: adam, bnew",
        ),
        ({"model__name": "resnet2"}, r"`model\.name` \(='resnet2'\) is not known; did you mean 'resnet20'\?"),
        ({"model__kernel_quantizer": "xnorr"}, r"`model\.kernel_quantizer` \(='xnorr'\) .* did you mean 'xnor'\?"),
        (
            {"model__input_quantizer": "step"},
            r"`model\.input_quantizer` \(='step'\) is not known; .* one of: abc_net",
        ),
        ({"loss": "hinge"}, r"`loss` \(='hinge'\) is not known; did you mean 'multiclass_hinge'\?"),
        ({"optim__schedule": "cos"}, r"`optim\.schedule` \(='cos'\) is not known; did you mean 'cosine'\?"),
        ({"optim__learning_rate": 0.0}, r"`optim\.learning_rate` \(=0\.0\) must be positive"),
        ({"optim__learning_rate": float("nan")}, r"`optim\.learning_rate` \(=nan\) must be positive"),
        ({"optim__momentum": 1.0}, r"`optim\.momentum` \(=1\.0\) must be in \[0, 1\)"),
        ({"optim__latent_box": (1.0, -1.0)}, r"`optim\.latent_box` \(=\(1\.0, -1\.0\)\) must be \(lower, upper\)"),
        ({"optim__inner_steps": 0}, r"`optim\.inner_steps` \(=0\) must be at least 1"),
        ({"optim__name": "adam", "optim__inner_steps": 2}, r"`optim\.inner_steps` \(=2\) is for dfw alone"),
        ({"loss": "cross_entropy"}, r"`loss` \(='cross_entropy'\) does not go with dfw, .* or another optimizer"),
        ({"epochs": 0}, r"`epochs` \(=0\) must be at least 1"),
        ({"batch_size": -1}, r"`batch_size` \(=-1\) must be at least 1"),
        (
            {"model__input_scaling": True, "model__input_quantizer": "full_precision"},
            r"`model\.input_scaling` \(=True\) needs quantized inputs",
        ),
        (
            {"model__kernel_quantizer_options": {"estimator": "ste_sing"}},
            r"xnor cannot be made: `estimator` \(='ste_sing'\) is not known; did you mean 'ste_sign'\?",
        ),
        (
            {"model__input_quantizer_options": {"clip_vale": 1.0}},
            r"ste_sign cannot be made: `option` \(='clip_vale'\) is not known; did you mean 'clip_value'\?",
        ),
        (
            {"model__options": {"stage_size": 2}},
            r"`model\.options` \(='stage_size'\) is not known; did you mean 'stage_sizes'\?",
        ),
        ({"regularizer": "manhatten"}, r"`regularizer` \(='manhatten'\) is not known; did you mean 'manhattan'\?"),
        (
            {"distillation__losses": {"atention": 1.0}},
            r"`distillation\.losses` \(='atention'\) is not known; did you mean 'attention'\?",
        ),
        (
            {"distillation__losses": {"attention": 0.0}, "optim__name": "adam", "loss": "cross_entropy"},
            r"`distillation\.losses` \(={'attention': 0\.0}\) must have positive weights; leave attention out",
        ),
        ({"distillation__losses": {"attention": 1.0}}, r"`distillation\.losses` \(=.*\) do not go with dfw"),
        (
            {"distillation__losses": {"distribution": 1.0}, "distillation__temperature": 4.0, "optim__name": "adam"},
            r"`distillation\.temperature` \(=4\.0\) is for the losses knowledge, embedding and similarity; leave it",
        ),
        (
            {"distillation__losses": {"knowledge": 1.0}, "distillation__queue_size": 7, "optim__name": "adam"},
            r"`distillation\.queue_size` \(=7\) is for the losses similarity alone; leave it out",
        ),
        ({"distillation__label_weight": 0.0}, r"`distillation\.label_weight` \(=0\.0\) must be 1 without"),
        ({"distillation__label_weight": -1.0}, r"`distillation\.label_weight` \(=-1\.0\) must not be negative"),
        ({"distillation__temperature": 0.0}, r"`distillation\.temperature` \(=0\.0\) must be positive"),
        ({"distillation__queue_size": 0}, r"`distillation\.queue_size` \(=0\) must be at least 1"),
        ({"regularizer": "tang"}, r"`regularizer` \(='tang'\) does not go with dfw"),
        ({"regularizer_strength": -1.0}, r"`regularizer_strength` \(=-1\.0\) must not be negative"),
        ({"optim__scale_latent": True}, r"`optim\.scale_latent` \(=True\) is for adam, sgd, polyak_sgd and momo"),
        (
            {"optim__name": "bnew", "optim__latent_box": None},
            r"`optim\.latent_box` \(=None\) must not be None for bnew",
        ),
        (
            {"optim__name": "bop", "optim__latent_box": (-0.5, 0.5)},
            r"`optim\.latent_box` \(=\(-0\.5, 0\.5\)\) must contain -1 and 1 for bop",
        ),
        (
            {"optim__name": "bop", "optim__options": {"treshold": 1e-6}},
            r"`optim\.options` \(='treshold'\) is not known; did you mean 'threshold'\?",
        ),
        (
            {"optim__name": "bop", "optim__options": {"threshold": -1.0}},
            r"^bop cannot be made: `threshold` \(=-1\.0\) must not be negative; 1e-6 is usual$",
        ),
        (
            {"optim__name": "bop", "optim__options": {"adaptivity_rate": 2}},
            r"^bop cannot be made: `adaptivity_rate` \(=2\) must be in \[0, 1\]; 1e-4 is usual$",
        ),
        (
            {"optim__name": "bnew", "optim__options": {"order": "between"}},
            r"""^bnew cannot be made: `order` \(='between'\) must be "before" or "after" the step of the optimizer$""",
        ),
        ({"optim__options": {"epsilon": "small"}}, r"^`epsilon` \(='small'\) must be a number$"),
        (
            {"optim__name": "adam", "loss": "cross_entropy", "optim__options": {"b2": 1.0}},
            r"^adam cannot be made: `b2` \(=1\.0\) must be in \[0, 1\); 0\.999 is usual$",
        ),
        (
            {"optim__name": "sgd", "loss": "cross_entropy", "optim__options": {"nesterov": 1}},
            r"^`nesterov` \(=1\) must be True or False$",
        ),
        (
            {"optim__schedule_options": {"factor": 0.1}},
            r"^`optim\.schedule_options` \(='factor'\) is not known; there is no option to set, leave it out$",
        ),
        (
            {"optim__schedule": "milestones", "optim__schedule_options": {"at_share": 0.5}},
            r"`optim\.schedule_options` \(='at_share'\) is not known; did you mean 'at_shares'\?",
        ),
        (
            {"optim__schedule": "milestones", "optim__schedule_options": {"at_shares": (0.5, 1.5)}},
            r"^milestones cannot be made: `at_shares` \(=\(0\.5, 1\.5\)\) must rise from above 0 to below 1; they are",
        ),
        (
            {"optim__schedule": "milestones", "optim__schedule_options": {"factor": "small"}},
            r"^`factor` \(='small'\) must be a number or several$",
        ),
        ({"optim__warmup_share": 1.0}, r"^`optim\.warmup_share` \(=1\.0\) must be in \[0, 1\)$"),
        ({"optim__warmup_start_share": -0.1}, r"^`optim\.warmup_start_share` \(=-0\.1\) must be in \[0, 1\]$"),
        ({"optim__latent_weight_decay": -1.0}, r"^`optim\.latent_weight_decay` \(=-1\.0\) must not be negative$"),
        (
            {"optim__name": "momo", "optim__latent_weight_decay": 1e-4},
            r"^`optim\.latent_weight_decay` \(=0\.0001\) is for dfw, adam, sgd, polyak_sgd, ovsw and bnew; leave it",
        ),
        ({"accumulate_steps": 3}, r"^`accumulate_steps` \(=3\) must divide `batch_size` \(=8\)$"),
        (
            {"accumulate_steps": 2, "optim__inner_steps": 3},
            r"^`accumulate_steps` \(=2\) must be 1 with `optim\.inner_steps` \(=3\), which need the whole batch",
        ),
        ({"optim__ema_decay": 1.0}, r"^`optim\.ema_decay` \(=1\.0\) must be in \(0, 1\), as float32$"),
        ({"data__mixup_alpha": -0.2}, r"^`data\.mixup_alpha` \(=-0\.2\) must not be negative; 0 switches mixup off$"),
        (
            {"data__smallest_area": 0.0},
            r"^`data\.smallest_area` \(=0\.0\) must be in \(0, 1\]; 1 is no crop$",
        ),
        ({"optim__max_gradient_norm": 0.0}, r"^`optim\.max_gradient_norm` \(=0\.0\) must be positive$"),
        (
            {"optim__max_gradient_norm": 1.0},
            r"^dfw cannot be made: `max_gradient_norm` \(=1\.0\) is for adam, sgd, bop, bnew: the step sizes of the",
        ),
        (
            {"optim__name": "momo", "optim__adaptive_clipping": 0.02},
            r"^momo cannot be made: `adaptive_clipping` \(=0\.02\) is for adam, sgd, bop, bnew: the step sizes of the",
        ),
        (
            {"optim__name": "bop", "optim__decay_only": ("*kernel",)},
            r"^`optim\.decay_only` \(=\('\*kernel',\)\) is for dfw, adam, sgd, polyak_sgd, ovsw and bnew; leave it",
        ),
        (
            {"regularizer_schedule": "exponential", "regularizer_schedule_options": {"final_share": 0.0}},
            r"^exponential cannot be made: `final_share` \(=0\.0\) must be positive; 1e-3 is usual$",
        ),
        (
            {"loss_options": {"temperature": 0.0}},
            r"^smoothed_multiclass_hinge cannot be made: `temperature` \(=0\.0\) must be positive; 1 is usual$",
        ),
        (
            {"loss_options": {"smoothing": 0.2}},
            r"`loss_options` \(='smoothing'\) is not known; choose one of: temperature",
        ),
        (
            {"model__options": {"execution": "bit"}},
            r"^\w+ cannot be made: `execution` \(='bit'\) of \w+ must be None \(the faster\) or one of bits, float32$",
        ),
    ],
)
def test_what_cannot_run_is_refused(changes, message):
    with pytest.raises(UsageError, match=message):
        validate(changed(**changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"epochs": 2.0}, r"^`epochs` \(=2\.0\) must be a whole number$"),
        ({"data__validation_examples": "9"}, r"^`data\.validation_examples` \(='9'\) must be a whole number or None$"),
        ({"epochs": True}, r"^`epochs` \(=True\) must be a whole number$"),
        ({"data__name": Path("x.npz")}, r"^`data\.name` \(=x\.npz\) must be a string$"),
        ({"optim__options": None}, r"^`optim\.options` \(=None\) must be options, as \{'b2': 0\.99\}$"),
        ({"distillation__losses": ["knowledge"]}, r"^`distillation\.losses` .* must be names with numbers, as"),
        ({"distillation__losses": {"knowledge": "3"}}, r"^`distillation\.losses` .* must be names with numbers, as"),
        ({"optimizers": ("sgd",)}, r"^`optimizers` \(=\('sgd',\)\) must be as \(OptimConfig\('sgd', 0\.1\),\)$"),
        ({"optim__learning_rate": None}, r"^`optim\.learning_rate` \(=None\) must be a number$"),
    ],
)
def test_a_value_of_another_kind_is_refused(changes, message):
    with pytest.raises(UsageError, match=message):
        validate(changed(**changes))


def test_what_is_no_config_or_no_tuple_of_patterns_is_refused(tmp_path):
    for pattern in ({"train_only": "*norm*"}, {"decay_only": "head"}):
        ((name, value),) = pattern.items()
        with pytest.raises(UsageError, match=rf"^`optim\.{name}` \(='{re.escape(value)}'\) must be patterns, as"):
            validate(changed(**{f"optim__{name}": value}))
    with pytest.raises(UsageError, match=r"^`optim\.latent_box` \(=1\.0\) must be two numbers or None$"):
        validate(changed(optim__latent_box=1.0))
    with pytest.raises(
        UsageError, match=r"^`config` \(='digits_xnor'\) must be of type Config; bnn_jax\.training\.config\.load_"
    ):
        validate("digits_xnor")
    for call in (train, bnn_jax.train):
        with pytest.raises(
            UsageError, match=r"^`config` \(='digits_xnor'\) must be of type Config; bnn_jax\.training\.config\.load_"
        ):
            call("digits_xnor", tmp_path, data=(np.zeros((10, 2, 2)), np.arange(10)))
        with pytest.raises(
            UsageError, match=r"^`teacher` \(='runs/x'\) must be of type Teacher; bnn_jax.stages.teachers"
        ):
            call(changed(), tmp_path, teacher="runs/x")
        with pytest.raises(
            UsageError, match=r"^`devices` \(=2\) must be a mesh; bnn_jax.training.devices.make_devices"
        ):
            call(changed(), tmp_path, devices=2)
    with pytest.raises(UsageError, match=r"^`optim.ema_decay` \(=0.99999999\) must be in \(0, 1\), as float32$"):
        validate(changed(optim__ema_decay=0.99999999))
    for stages in ("reactnet", Stage("one", changed()), [changed()]):
        with pytest.raises(
            UsageError, match=r"^`stages`, of type \w+, must be Stages in a list; RECIPES\['reactnet'\]"
        ):
            run_stages(stages, tmp_path)
    with pytest.raises(UsageError, match=r"^`data` \(='digits'\) must be of type DataConfig$"):
        validate(changed(data="digits"))
    given = {"optim__decay_only": ["*kernel"], "optim__latent_box": [-1.0, 1.0]}
    found = validate(changed(seed=np.int64(3), optim__learning_rate=np.float32(0.5), **given))
    assert (found.seed, found.optim.learning_rate, found.optim.decay_only) == (3, 0.5, ("*kernel",))
    assert (type(found.seed), type(found.optim.learning_rate)) == (int, float)
    assert from_dict(to_dict(changed(seed=np.int64(3)))).seed == 3
    assert hash(found.optim.latent_box) == hash((-1.0, 1.0))


@dataclass(frozen=True)
class Arguments:
    settings: Settings
    config: Path = ROOT / "configs" / "digits_xnor.py"
    optimizer: str | None = None


def test_overrides_from_the_command_line():
    found = parse(Arguments, argv=["--optimizer", "adam", "--optim.learning-rate", "0.5", "--epochs", "7"]).settings
    expected = load_config(Arguments.config)
    optim = replace(select_optimizer(expected, "adam"), learning_rate=0.5)
    assert found == replace(expected, optim=optim, epochs=7)


@pytest.mark.parametrize(
    ("option", "words", "value"),
    [
        ("model.options", "extra_layers 1", {"extra_layers": 1}),
        ("model.options", "stage_sizes 1 2", {"stage_sizes": (1, 2)}),
        ("model.options", "reduction 2.7 2.2", {"reduction": (2.7, 2.2)}),
        ("optim.options", "epsilon 1e-4", {"epsilon": 1e-4}),
        ("optim.schedule-options", "at_shares 0.5 0.9 factor 0.2", {"at_shares": (0.5, 0.9), "factor": 0.2}),
        ("loss-options", "temperature 2.0", {"temperature": 2.0}),
        ("regularizer-schedule-options", "final_share 0.5", {"final_share": 0.5}),
    ],
)
def test_options_on_the_command_line_and_in_json(option, words, value):
    # Of lambda's schedule nothing is read without a regularizer.
    config = parse(Arguments, argv=[f"--{option}", *words.split(), "--regularizer", "manhattan"]).settings
    assert repr(attrgetter(option.replace("-", "_"))(config)) == repr(value)  # 1 is equal to 1.0, but no size
    assert from_dict(to_dict(config)) == config


def test_options_are_added_to_those_of_the_config_file(tmp_path, capsys):
    path = tmp_path / "config.py"
    path.write_text(
        "from bnn_jax.training.config import Config, ModelConfig, OptimConfig\n"
        "def get_config():\n"
        "    optim = OptimConfig('bop', options={'threshold': 1e-7}, schedule_options={'final_share': 0.1})\n"
        "    return Config('test', 1, 8, optim=optim, model=ModelConfig(options={'stage_sizes': (1, 2)}))\n"
    )
    argv = ["--config", str(path), "--optim.options", "adaptivity_rate", "0.1", "--optim.schedule-options"]
    config = parse(Arguments, argv=argv).settings
    assert config.optim.options == {"threshold": 1e-7, "adaptivity_rate": 0.1}
    assert config.optim.schedule_options == {}
    assert config.model.options == {"stage_sizes": (1, 2)}
    for argv, message in (
        (["--optim.options", "threshold"], "the option threshold needs a value after it"),
        (["--optim.options", "1e-6"], "needs the name of an option before it"),
    ):
        with pytest.raises(SystemExit) as ended:
            parse(Arguments, argv=argv)
        assert ended.value.code == 2
        assert message in " ".join(capsys.readouterr().err.replace("│", " ").split())


def test_a_config_of_an_earlier_version_has_no_options():
    values = to_dict(CONFIG)
    for key in ("loss_options", "regularizer_schedule_options"):
        assert values.pop(key) == {}
    for optim in (values["optim"], *values["optimizers"]):
        assert optim.pop("options") == optim.pop("schedule_options") == {}
    assert from_dict(values) == CONFIG


def test_options_reach_what_they_are_for():
    """The experiment of a config with options is made of the functions with these options."""
    config = changed(
        optim__options={"epsilon": 10.0},
        optim__schedule="milestones",
        optim__schedule_options={"at_shares": 0.5, "factor": 0.5},
        loss_options={"temperature": 3.0},
        model__name="lenet",
    )
    info = ImageInfo((8, 8, 1), 10, (0.5,), (0.5,))
    experiment = make_experiment(validate(config), info, total_steps=10)
    assert [float(experiment.learning_rate(step)) for step in (0, 4, 5, 9)] == [1.0, 1.0, 0.5, 0.5]
    logits, labels = jnp.array([[0.3, 0.5, -1.0]]), jnp.array([2])
    expected = smoothed_multiclass_hinge(logits, labels, temperature=3.0)
    np.testing.assert_array_equal(experiment.loss.apply(logits, labels), expected)
    np.testing.assert_array_equal(experiment.loss.monitored(logits, labels), multiclass_hinge(logits, labels))
    w = {"kernel": jnp.ones(1)}
    _, state = experiment.optimizer.update(w, experiment.optimizer.init(w), w, value=jnp.array(1.0))
    assert float(state.gamma) == pytest.approx(1 / 11)


@pytest.mark.parametrize(
    "changes",
    [
        {"optim__options": {"epsilon": 1e-4}},
        {"optim__schedule": "milestones", "optim__schedule_options": {"factor": 0.5}},
        {"loss_options": {"temperature": 2.0}},
        {"regularizer_schedule_options": {"final_share": 0.5}, "regularizer_schedule": "exponential"},
    ],
    ids=lambda changes: min(changes),
)
def test_other_options_are_another_program(changes):
    """Options do not enter hashes, for they are dicts; equal hashes are compared."""
    info = ImageInfo((8, 8, 1), 10, (0.5,), (0.5,))
    default = changed(**{key: value for key, value in changes.items() if "options" not in key}, model__name="lenet")
    other = changed(**changes, model__name="lenet")
    assert hash(default) == hash(other)
    programs = [make_programs(config, info, examples=16) for config in (default, other, default, other)]
    assert programs[0] is programs[2] is not programs[1] is programs[3]


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--optim.lerning-rate", "0.1"], "--optim.learning-rate"),
        (["--model.widht", "3"], "--model.width"),
        (["--epochs", "many"], "--epochs"),
    ],
)
def test_unknown_keys_end_with_2_and_the_nearest_name(argv, words, capsys):
    with pytest.raises(SystemExit) as ended:
        parse(Arguments, argv=argv)
    assert ended.value.code == 2
    assert words in capsys.readouterr().err


def test_unknown_optimizer_and_config_file(tmp_path):
    with pytest.raises(UsageError, match=r"`optimizer` \(='adan'\) is not known; did you mean 'adam'\?"):
        parse(Arguments, argv=["--optimizer", "adan"])
    with pytest.raises(UsageError, match=r"`--config` \(=.*nothing\.py\) does not exist; files in that folder: none"):
        load_config(tmp_path / "nothing.py")
    (tmp_path / "empty.py").write_text("x = 1\n")
    with pytest.raises(UsageError, match=r"empty\.py\) must define a function get_config\(\)"):
        load_config(tmp_path / "empty.py")
    (tmp_path / "broken.py").write_text("def get_config():\n    return {}['width']\n")
    with pytest.raises(UsageError, match=r"broken\.py\) cannot be run: KeyError: 'width' \(.*broken\.py, line 2\)$"):
        load_config(tmp_path / "broken.py")


def test_from_dict_names_the_nearest_key():
    values = to_dict(CONFIG)
    values["optim"]["learning_rat"] = values["optim"].pop("learning_rate")
    with pytest.raises(
        UsageError, match=r"`config key` \(='optim\.learning_rat'\) .* did you mean 'optim\.learning_rate'\?"
    ):
        from_dict(values)


def test_every_setting_is_frozen_and_documented():
    for cls in (Config, DataConfig, ModelConfig, OptimConfig):
        assert cls.__dataclass_params__.frozen
        assert cls.__doc__
        assert dataclasses.fields(cls)
