"""What is overridden is applied or refused: settings on a command line, rows of comparisons, recipes, a box."""

import dataclasses
from dataclasses import dataclass, replace
from operator import attrgetter
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from run_script import run_script

from bnn_jax.cli.comparisons import optimizer_rows
from bnn_jax.errors import UsageError
from bnn_jax.optim import deep_frank_wolfe, is_latent, keep_in_box, latent_box
from bnn_jax.stages.recipes import RECIPES
from bnn_jax.sweeps.grid import grid_cells, parse_axes, scalar_options, split_axes
from bnn_jax.training.config import Config, DataConfig, ModelConfig, OptimConfig, Settings, load_config
from bnn_jax.training.options import Options
from bnn_jax.training.overrides import OWNERS, check_applied, parse, parse_with_overrides
from bnn_jax.training.validation import validate

DIGITS = Path(__file__).parents[2] / "configs" / "digits_xnor.py"
SETTINGS = load_config(DIGITS)
MINE = """
from bnn_jax.training.config import Config, ModelConfig, OptimConfig
def get_config():
    optim = OptimConfig("bop", 0.1, options={"threshold": 1e-7}, schedule="exponential",
                        schedule_options={"final_share": 0.1})
    model = ModelConfig("lenet", 12, "ste_sign", {"clip_value": 1.5}, "binary", {"estimator": "approx_sign"},
                        options={"extra_layers": 1})
    return Config("mine", 1, 8, loss="label_smoothed_cross_entropy", loss_options={"smoothing": 0.2}, optim=optim,
                  model=model)
"""


@dataclass(frozen=True)
class Arguments:
    settings: Settings
    config: Path = DIGITS
    optimizer: str | None = None


@dataclass(frozen=True)
class Comparison:
    settings: Settings
    config: Path = DIGITS
    optimizers: tuple[str, ...] = ("dfw", "adam")
    seeds: tuple[int, ...] = (0,)
    tune: bool = False


def config_of(line, arguments=Arguments, **options):
    return parse(arguments, argv=line.split(), **options).settings


@pytest.fixture(scope="module")
def mine(tmp_path_factory):
    path = tmp_path_factory.mktemp("config") / "mine.py"
    path.write_text(MINE)
    return path


# -- names and what goes with them


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("--optim.name adam", SETTINGS.optimizers[1]),
        ("--optim.name adam --optim.momentum 0.5", replace(SETTINGS.optimizers[1], momentum=0.5)),
        ("--optim.momentum=0.5 --optim.name=adam", replace(SETTINGS.optimizers[1], momentum=0.5)),
        # The value that the file has for another optimizer is a value that is given.
        ("--optim.name adam --optim.learning-rate 3.0", replace(SETTINGS.optimizers[1], learning_rate=3.0)),
        ("--optim.name dfw", SETTINGS.optim),
        ("--optim.name bop --optim.learning-rate 0.01", OptimConfig("bop", 0.01, schedule=SETTINGS.optim.schedule)),
    ],
)
def test_an_optimizer_comes_with_its_own_settings(line, expected):
    assert config_of(line).optim == expected


@pytest.mark.parametrize(("line", "axes"), [(" --optim.name adam", ()), ("", ("optim.name",))])
def test_an_optimizer_that_is_named_twice_is_refused(line, axes):
    with pytest.raises(UsageError, match=r"^`--optimizer` \(=sgd\) does not go with `--optim.name`; leave one of them"):
        config_of(f"--optimizer sgd{line}", axes=axes)


def test_an_optimizer_without_settings_needs_a_learning_rate():
    with pytest.raises(
        UsageError,
        match=r"^`optim.name` \(='bop'\) has no settings in the config, and the learning rate 1.4 is that of dfw; give "
        r"`--optim.learning-rate` too, or choose one of: dfw, adam, sgd, polyak_sgd, momo$",
    ):
        config_of("--optim.name bop")


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("--model.name resnet8", {"model.width": None, "model.options": {}, "loss_options": {"smoothing": 0.2}}),
        ("--model.name resnet8 --model.width 12", {"model.width": 12}),
        ("--model.name resnet8 --model.options stage_sizes 1 2", {"model.options": {"stage_sizes": (1, 2)}}),
        ("--model.name lenet", {"model.width": 12, "model.options": {"extra_layers": 1}}),
        ("--model.options kernel_size 3", {"model.options": {"extra_layers": 1, "kernel_size": 3}}),
        ("--model.options", {"model.options": {}}),
        ("--model.input-quantizer approx_sign", {"model.input_quantizer_options": {}}),
        ("--model.kernel-quantizer xnor", {"model.kernel_quantizer_options": {}, "model.width": 12}),
        ("--loss cross_entropy", {"loss_options": {}}),
        ("--loss label_smoothed_cross_entropy", {"loss_options": {"smoothing": 0.2}}),
        ("--optim.schedule cosine", {"optim.schedule_options": {}, "optim.options": {"threshold": 1e-7}}),
        ("--optim.schedule linear --optim.schedule-options a 1", {"optim.schedule_options": {"a": 1}}),
        ("--optim.name adam --optim.learning-rate 0.1", {"optim.options": {}, "optim.schedule": "exponential"}),
    ],
)
def test_options_stay_with_the_name_that_they_are_for(line, expected, mine):
    config = config_of(f"--config {mine} {line}")
    assert {name: attrgetter(name)(config) for name in expected} == expected


def test_every_setting_with_options_has_an_owner():
    for kind in (Config, DataConfig, ModelConfig, OptimConfig):
        fields = {field.name: field.type for field in dataclasses.fields(kind)}
        assert {name for name, hint in fields.items() if hint == Options} <= OWNERS.get(kind, {}).keys()
        assert OWNERS.get(kind, {}).keys() <= fields.keys()


UNREAD = {
    "regularizer_strength",
    "regularizer_schedule",
    "tune_epochs",
    "tune_trials",
    "optim.warmup_start_share",
    "data.data_dir",
    "distillation.temperature",
    "distillation.queue_size",
    "diagnostics.histogram_bins",
    "diagnostics.mismatch_coordinates",
}
"""Settings that the config for digits does not read."""


def another(name):
    """Another value of a setting, as text."""
    value = attrgetter(name)(SETTINGS)
    if isinstance(value, bool):
        return str(not value)
    words = {"optim.name": "adam", "regularizer": "none"}
    return words.get(name, "0.25" if isinstance(value, float) else "7" if not isinstance(value, str) else "other")


def test_every_setting_with_one_value_is_applied():
    values = {name: another(name) for name in scalar_options() if name not in UNREAD | {"diagnostics.every_steps"}}
    words = {"True": "--{}", "False": "--no-{}"}
    config = config_of(" ".join(words.get(text, f"--{{}} {text}").format(name) for name, text in values.items()))
    for name, text in values.items():
        found = attrgetter(name)(config)
        assert found == float(text) if isinstance(found, float) else str(found) == text, name


@pytest.mark.parametrize("name", sorted(UNREAD))
def test_a_setting_that_is_not_read_is_refused(name):
    with pytest.raises(
        UsageError, match=rf"^`--{name.replace('_', '-')}` (\(=.*\) )?is read only with `--.*; give that too"
    ):
        config_of(f"--{name} {another(name)}")


def test_what_another_setting_makes_read_is_taken_with_it():
    line = (
        "--regularizer manhattan --regularizer-strength 1e-3 --diagnostics.every-steps 9 --diagnostics.histogram-bins 5"
    )
    config = config_of(f"{line} --optim.decay-only *kernel --optim.weight-decay 1e-4")
    assert (config.regularizer_strength, config.diagnostics.histogram_bins) == (1e-3, 5)
    with pytest.raises(
        UsageError, match=r"`--optim.decay-only` .* is read only with `--optim.weight-decay` or `--optim.late"
    ):
        config_of("--optim.decay-only *kernel")


# -- sweeps and comparisons


def test_an_axis_of_names_brings_the_settings_of_each():
    config = config_of("--optim.weight-decay 1e-4", axes=("optim.name",))
    cells = grid_cells(config, {"optim.name": ("dfw", "adam"), "model.name": ("resnet6", "lenet")})
    found = [(c.optim.name, c.optim.learning_rate, c.optim.weight_decay, c.model.width) for c, _ in cells.values()]
    assert found == [
        ("dfw", 1.4, 1e-4, 32),
        ("dfw", 1.4, 1e-4, None),
        ("adam", 0.04, 1e-4, 32),
        ("adam", 0.04, 1e-4, None),
    ]
    with pytest.raises(UsageError, match=r"`optim.name` \(='bop'\) has no settings in the config"):
        grid_cells(SETTINGS, {"optim.name": ("adam", "bop")})
    assert len(grid_cells(SETTINGS, {"optim.name": ("adam", "bop"), "optim.learning_rate": (0.1, 0.2)})) == 4
    options = grid_cells(SETTINGS, {"loss": ("label_smoothed_cross_entropy",), "loss_options.smoothing": (0.1, 0.2)})
    assert [cell.loss_options for cell, _ in options.values()] == [{"smoothing": 0.1}, {"smoothing": 0.2}]


@pytest.mark.parametrize(
    ("line", "name", "expected"),
    [
        ("--model.name lenet bireal_resnet20 --model.width 8", "model.width", [8, 8]),
        ("--model.name lenet bireal_resnet20", "model.width", [12, None]),
        ("--optim.schedule cosine linear", "optim.schedule_options", [{}, {}]),
        # What the file has for an exponential schedule stays behind.
        (
            "--optim.schedule cosine exponential --optim.schedule-options cycles 2",
            "optim.schedule_options",
            [{"cycles": 2}, {"final_share": 0.1, "cycles": 2}],
        ),
        (
            "--optim.schedule cosine linear --optim.schedule-options cycles 2 --optim.schedule-options.a 1 3",
            "optim.schedule_options",
            [{"cycles": 2, "a": 1}, {"cycles": 2, "a": 3}] * 2,
        ),
        ("--loss cross_entropy focal --loss-options smoothing 0.3", "loss_options", [{"smoothing": 0.3}] * 2),
        (
            "--model.kernel-quantizer dorefa binary --model.kernel-quantizer-options bits 2",
            "model.kernel_quantizer_options",
            [{"bits": 2}, {"estimator": "approx_sign", "bits": 2}],
        ),
        (
            "--optim.name bop adam --optim.learning-rate 0.3 --optim.schedule-options final_share 0.5",
            "optim.schedule_options",
            [{"final_share": 0.5}] * 2,
        ),
        ("--optim.name bop adam --optim.learning-rate 0.3 --optim.options b2 0.9", "optim.options", "b2 alone"),
    ],
)
def test_an_override_holds_in_every_cell_of_a_sweep(line, name, expected, mine):
    texts, argv = split_axes(f"--config {mine} {line}".split())
    arguments, overrides = parse_with_overrides(Arguments, argv=argv, axes=texts)
    cells = grid_cells(arguments.settings, parse_axes(arguments.settings, texts), overrides)
    expected = [{"threshold": 1e-7, "b2": 0.9}, {"b2": 0.9}] if expected == "b2 alone" else expected
    assert [attrgetter(name)(cell) for cell, _ in cells.values()] == expected


def test_an_override_that_a_cell_does_not_take_is_refused():
    cells = grid_cells(
        SETTINGS, {"loss": ("label_smoothed_cross_entropy", "cross_entropy")}, {"loss_options": {"smoothing": 0.2}}
    )
    smoothed, plain = (replace(cell, optim=SETTINGS.optimizers[1]) for cell, _ in cells.values())
    assert validate(smoothed).loss_options == {"smoothing": 0.2}
    with pytest.raises(UsageError, match=r"^`loss_options` \(='smoothing'\) is not known; there is no option to set"):
        validate(plain)


def test_an_axis_that_no_cell_reads_is_refused():
    with pytest.raises(UsageError, match=r"`--regularizer-strength` \(=0.1\) is read only with `--regularizer`"):
        grid_cells(SETTINGS, {"regularizer_strength": (0.1, 0.2)})
    strengths = {"regularizer": ("none", "manhattan"), "regularizer_strength": (0.1, 0.2)}
    assert len(grid_cells(SETTINGS, strengths)) == 4


def test_an_override_of_the_optimizer_holds_for_every_row_of_a_comparison():
    config = config_of("--optim.learning-rate 0.5 --optim.schedule linear", Comparison)
    rows = optimizer_rows(config, ("dfw", "adam", "sgd"), {config.loss: {}})
    assert [(cell.optim.learning_rate, cell.optim.schedule) for cell, _ in rows.values()] == [(0.5, "linear")] * 3


def test_what_is_to_be_tuned_takes_the_place_of_what_each_row_tunes():
    config = config_of("--tune --optim.tune weight_decay 1e-4 1e-3 --optim.learning-rate 0.1", Comparison)
    rows = optimizer_rows(config, ("dfw", "adam", "sgd"), {config.loss: {}})
    assert [cell.optim.tune for cell, _ in rows.values()] == [{"weight_decay": (1e-4, 1e-3)}] * 3


def test_what_a_row_that_is_left_out_would_tune_may_be_set():
    line = "--tune --optim.weight-decay 1e-4 --config {} --optimizers"
    with pytest.raises(UsageError, match=r"^`--optim.weight-decay` is what `--tune` chooses; leave one of them out"):
        config_of(f"{line.format(DIGITS)} dfw momo", Comparison)
    assert config_of(f"{line.format(DIGITS)} dfw adam", Comparison).optim.weight_decay == 1e-4


def test_a_setting_is_read_where_one_of_the_rows_or_what_is_tuned_reads_it():
    config = config_of("--optim.decay-only *kernel", Comparison)
    assert config.optim.decay_only == ("*kernel",)
    tuned = config_of("--optim.warmup-start-share 0.5 --optim.tune warmup_share 0.1 0.2 0.3 --tune", Comparison)
    assert tuned.optim.warmup_start_share == 0.5
    with pytest.raises(UsageError, match=r"`--optim.warmup-start-share` .* is read only with `--optim.warmup-share`"):
        config_of("--optim.warmup-start-share 0.5", Comparison)
    axes = ("optim.latent_weight_decay",)
    assert config_of("--optim.decay-only *kernel", axes=axes).optim.decay_only == ("*kernel",)


def test_each_loss_of_a_comparison_has_its_own_options(mine):
    config = config_of(f"--config {mine} --loss cross_entropy")
    rows = optimizer_rows(config, ("bop",), {"label_smoothed_cross_entropy": {"smoothing": 0.2}, "cross_entropy": {}})
    assert [cell.loss_options for cell, _ in rows.values()] == [{"smoothing": 0.2}, {}]


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("--optim.name adam", r"`--optim.name` is of a single run; name those to compare with `--optimizers`"),
        ("--seed 3", r"`--seed` is of a single run; name those to compare with `--seeds`"),
        ("--optim.learning-rate 1 --tune", r"`--optim.learning-rate` is what `--tune` chooses; leave one of them"),
        (
            "--tune --optimizers adam --optim.tune options.b2 0.9 0.99 0.999 --optim.options b2 0.5",
            r"`--optim.options.b2` is what `--tune` chooses; leave one of them",
        ),
        ("--tune-epochs 2", r"`--tune-epochs` is read only with `--tune` of a comparison; give that too"),
        ("--optim.tune learning_rate 1 2", r"`--optim.tune` is read only with `--tune` of a comparison; give that too"),
    ],
)
def test_what_a_comparison_does_not_read_is_refused(line, words):
    with pytest.raises(UsageError, match=words):
        config_of(line, Comparison)


def test_an_option_is_an_axis_or_given_once():
    line, axes = "--optim.name bop --optim.learning-rate 1 --optim.options {} 0.5", ("optim.options.threshold",)
    assert config_of(line.format("adaptivity_rate"), axes=axes).optim.options == {"adaptivity_rate": 0.5}
    sentence = r"^`--optim.options.threshold` is given twice, and in `--optim.options`; leave one out$"
    with pytest.raises(UsageError, match=sentence):
        config_of(line.format("threshold"), axes=axes)


def test_what_the_maker_of_rows_sets_itself_is_refused():
    def make(config):
        return [replace(config, batch_size=4, epochs=min(config.epochs, 9), optim=SETTINGS.optim, optimizers=())]

    after = replace(SETTINGS, epochs=7, loss="cross_entropy")
    check_applied(SETTINGS, after, make, "it")
    with pytest.raises(
        UsageError, match=r"^`--batch-size` \(=5\) changes nothing, for it sets it itself; leave it out$"
    ):
        check_applied(SETTINGS, replace(after, batch_size=5), make, "it")
    decayed = config_of("--optim.weight-decay 1e-3", Comparison)
    check_applied(SETTINGS, decayed, lambda config: config.optimizers, "it")
    with pytest.raises(UsageError, match=r"^`--optim.weight-decay` \(=0.001\) changes nothing, for it sets it itself"):
        check_applied(SETTINGS, decayed, make, "it")


@pytest.mark.parametrize(
    ("script", "line", "words"),
    [
        ("train_stages", "dir_net --optim.learning-rate 0.1", r"`--optim.learning-rate` .* the recipe dir_net sets it"),
        ("train_stages", "dir_net --loss multiclass_hinge", r"`--loss` \(=multiclass_hinge\) changes nothing, for the"),
        (
            "train_stages",
            "dir_net --workers 2",
            r"`--workers` \(=2\) is for images read from disk, with `--data.stream`",
        ),
        ("train", "--strict", r"`--strict` \(=True\) is for images read from disk, with `--data.stream`; leave it out"),
        (
            "train",
            "--num-processes 2",
            r"`--num-processes` \(=2\) is for one of several processes, with `--distributed`",
        ),
        ("train", "--optim.name bop", r"`--optim.name` \(='bop'\) has no settings in the config"),
        ("sweep", "--jobs 2", r"`--jobs` \(=2\) is for `--execution processes`; leave it out"),
        ("sweep", "--execution sequential --group-size 2", r"`--group-size` \(=2\) is for `--execution vmapped`"),
        ("compare_optimizers", "--jobs 2", r"`--jobs` \(=2\) is for `--execution processes`; leave it out"),
        ("compare_estimators", "--model.input-quantizer tanh_sign", r"`--model.input-quantizer` .* each row sets it"),
        (
            "compare_estimators",
            "--rows STE",
            r"`--rows` \(=\('STE',\)\) is for a config with get_rows\(\), not digits_xnor",
        ),
        (
            "compare_estimators",
            "--config configs/cifar10_lenet.py --quantizes both",
            r"`--quantizes` \(=both\) is for a config without get_rows\(\), not configs/cifar10_lenet.py; leave it out",
        ),
        (
            "compare_architectures",
            "--model.width 4",
            r"`--model.width` \(=4\) changes nothing, for get_rows\(\) of cifar10_architectures sets it",
        ),
        ("benchmark", "packed --values 10", r"`--values` \(=10\) is not for packed; leave it out"),
        ("summarize", "--table igp --width 4", r"`--width` \(=4\) is for a network, not for a `--table`; leave it out"),
    ],
)
def test_scripts_refuse_what_they_would_not_read(script, line, words, tmp_path):
    folder = () if script in ("benchmark", "summarize") else ("--workdir", tmp_path / "run")
    done = run_script(script, *line.split(), *folder, code=2)
    assert np.size(done.stderr.splitlines()) == 1
    with pytest.raises(UsageError, match=words):
        raise UsageError(done.stderr)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_leaves_the_options_of_another_loss_behind(recipe):
    before = replace(
        SETTINGS, loss="label_smoothed_cross_entropy", loss_options={"smoothing": 0.2}, optim=OptimConfig("sgd")
    )
    for stage in RECIPES[recipe](before):
        assert validate(stage.config).loss_options == {}


# -- a box


PARAMS = {"conv": {"latent_kernel": jnp.full(3, 0.9)}, "head": {"kernel": jnp.full(3, 0.9)}}
GRADIENT = {"conv": {"latent_kernel": jnp.full(3, -1.0)}, "head": {"kernel": jnp.full(3, -1.0)}}


def test_inject_hyperparams_keeps_the_box(standard_dtypes):
    optimizer = optax.inject_hyperparams(deep_frank_wolfe)(learning_rate=1.0, momentum=0.0, box=latent_box())
    step = jax.jit(lambda state: optax.apply_updates(PARAMS, optimizer.update(GRADIENT, state, PARAMS, value=5.0)[0]))
    moved = step(optimizer.init(PARAMS))
    assert moved["conv"]["latent_kernel"].tolist() == [1.0] * 3
    assert float(moved["head"]["kernel"].min()) > 1.5


def test_a_function_that_inject_hyperparams_takes_for_a_schedule_is_refused():
    def box(params):
        return jax.tree.map(lambda latent: (-1.0, 1.0) if latent else None, is_latent(params))

    optimizer = optax.inject_hyperparams(keep_in_box)(box=box)
    with pytest.raises(TypeError, match=r"`params` is an array of int32, not a tree of parameters: .* `static_args`"):
        optimizer.init(PARAMS)
    optimizer = optax.inject_hyperparams(keep_in_box, static_args=("box",))(box=box)
    updates, _ = jax.jit(optimizer.update)(PARAMS, optimizer.init(PARAMS), PARAMS)
    np.testing.assert_allclose(updates["conv"]["latent_kernel"], 0.1, rtol=1e-6)


# -- what a sentence calls a setting


@pytest.mark.parametrize(
    ("script", "line", "words"),
    [
        ("train", "--data.validation-examples 100000", r"error: `--data\.validation-examples` \(=100000\) must"),
        ("train", "--data.smallest-area 2", r"error: `--data\.smallest-area` \(=2\.0\) must be in \(0, 1\]"),
        ("train", "--batch-size 100000", r"error: `--batch-size` \(=100000\) is larger than"),
        ("sweep", "--optim.learning-rate 0.1 -1", r"error: `--optim\.learning-rate` \(=-1\.0\) must be positive"),
        ("compare_optimizers", "--optimizers dfw adamm", r"error: `--optimizers` \(='adamm'\) is not known; did you"),
        ("train_stages", "nothing", r"error: `recipe` \(='nothing'\) is not known"),
    ],
)
def test_a_sentence_names_the_option_that_one_types(script, line, words, tmp_path):
    done = run_script(script, *line.split(), "--workdir", tmp_path / "run", code=2)
    with pytest.raises(UsageError, match=words):
        raise UsageError(done.stderr)
