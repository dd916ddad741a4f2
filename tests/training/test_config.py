"""Configs: what is refused, with which words; overrides; the round trip through JSON."""

import dataclasses
import runpy
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from bnn_jax.errors import UsageError
from bnn_jax.training.config import (
    Config,
    DataConfig,
    ModelConfig,
    OptimConfig,
    Settings,
    from_dict,
    load_config,
    parse,
    select_optimizer,
    to_dict,
)
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
    assert len({len(optim.tune_learning_rates) for optim in (*config.optimizers, config.optim)}) == 1
    header = path.read_text().split('"""')[1]
    assert "Paper:" in header
    assert f"configs/{path.name}" in header


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
            r"`distillation\.losses` \(=attention 0\.0\) must have positive weights; leave attention out",
        ),
        ({"distillation__losses": {"attention": 1.0}}, r"`distillation\.losses` \(=.*\) do not go with dfw"),
        ({"distillation__label_weight": 0.0}, r"`distillation\.label_weight` \(=0\.0\) must be 1 without"),
        ({"distillation__label_weight": -1.0}, r"`distillation\.label_weight` \(=-1\.0\) must not be negative"),
        ({"distillation__temperature": 0.0}, r"`distillation\.temperature` \(=0\.0\) must be positive"),
        ({"distillation__queue_size": 0}, r"`distillation\.queue_size` \(=0\) must be at least 1"),
        ({"regularizer": "tang"}, r"`regularizer` \(=tang\) does not go with dfw"),
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
    ],
)
def test_what_cannot_run_is_refused(changes, message):
    with pytest.raises(UsageError, match=message):
        validate(changed(**changes))


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
    ("words", "value"),
    [
        (["extra_layers", "1"], {"extra_layers": 1}),
        (["stage_sizes", "1", "2"], {"stage_sizes": (1, 2)}),
        (["reduction", "2.7", "2.2"], {"reduction": (2.7, 2.2)}),
    ],
)
def test_options_of_networks_on_the_command_line_and_in_json(words, value):
    config = parse(Arguments, argv=["--model.options", *words]).settings
    assert repr(config.model.options) == repr(value)  # 1 is equal to 1.0, but no size
    assert from_dict(to_dict(config)) == config


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
