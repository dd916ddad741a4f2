"""Train in stages: bnn-jax stages reactnet --config digits_xnor --workdir runs/reactnet

Recipes: bireal, reactnet, real_to_binary, dir_net, dgrl, ttq, inq, bnn_plus, s2_bnn, binaryduo, rbnn, biper, stompp;
what they do stands in bnn_jax/stages/recipes.py.  A recipe sets quantizers, optimizers and losses itself; of the config
it takes the data, batch size, seed, epochs and the size of the network.  Started again with the same arguments it
resumes; finished stages are not run again.
--finished teacher runs/big puts a finished run in the place of the stage `teacher`.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import tyro

from bnn_jax.checks import look_up
from bnn_jax.cli.options import TrainingOptions
from bnn_jax.compilation import use_compilation_cache
from bnn_jax.names import last_part
from bnn_jax.stages.recipes import RECIPES
from bnn_jax.stages.stage import replace_stage, run_stages
from bnn_jax.training.config import load_config
from bnn_jax.training.devices import make_devices
from bnn_jax.training.overrides import check_applied, parse
from bnn_jax.training.progress import progress_display


@dataclass(frozen=True, kw_only=True)
class Arguments(TrainingOptions):
    recipe: tyro.conf.Positional[str] = tyro.MISSING
    """Name of a recipe."""
    finished: Annotated[dict[str, str], tyro.conf.arg(metavar="[STAGE FOLDER ...]")] = field(default_factory=dict)
    """Stages that are not run, with the folder of the finished run that takes the place of each."""


def main() -> None:
    arguments = parse(Arguments, __doc__)
    config, recipe = arguments.settings, arguments.recipe
    make_stages = look_up("recipe", recipe, RECIPES)
    workdir = arguments.workdir or Path("runs") / f"{config.name}_{last_part(recipe)}_seed{config.seed}"
    check_applied(load_config(arguments.config), config, make_stages, f"the recipe {recipe}")
    use_compilation_cache()
    stages = make_stages(config)
    # In the order of training: one that leads to another finished one alone is gone after that.
    order = {stage.name: number for number, stage in enumerate(stages)}
    for name, folder in sorted(arguments.finished.items(), key=lambda item: order.get(item[0], -1)):
        stages = replace_stage(stages, name, folder)
    for stage in stages:
        model, optim = stage.config.model, stage.config.optim
        quantizers = f"inputs {model.input_quantizer}, kernels {model.kernel_quantizer}"
        print(f"{stage.name}: {last_part(model.name)}, {quantizers}, ", end="")
        print(f"{last_part(optim.name)} {optim.learning_rate:g}, {stage.config.epochs} epochs")
    training = arguments.reading() | {"devices": make_devices(arguments.devices)}
    with progress_display(f"{config.name} {last_part(recipe)}") as on_progress:
        results = run_stages(stages, workdir, on_progress=on_progress, announce=print, **training)
    for name, result in results.items():
        print(f"{name}: test accuracy {100 * result['test_accuracy_last']:.2f} % at the last epoch, ", end="")
        print(f"{100 * result['test_accuracy_best']:.2f} % at epoch {result['best_epoch']}, the best in validation")
    print(f"{workdir}: a folder a stage, with stage.json and what an ordinary run writes")
