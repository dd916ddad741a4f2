"""Hashes of eight short runs and of ten networks after one step: a restructuring proves by them that no bit changed.

python tests/golden/golden.py            # compares with golden.json beside it; exit code 1 where one differs
python tests/golden/golden.py --write    # makes it anew

They are taken at XLA's default flags and hold for one machine's arithmetic and one version of jax, so no test depends
on them: make them before a change on the machine on which they are compared after it.

A hash is SHA-256 over dtype, shape and bytes of every array, in the order of the arrays' names.  Where the product has
renamed a parameter since the hashes were made, RENAMED says what it was called: values, order and the random start,
which Flax derives from the names of modules, go by the old name.
"""

import argparse
import hashlib
import json
import re
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path

import flax.core.scope
import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

sys.path.insert(0, str(Path(__file__).parents[1]))
from small_models import SIDES, small
from small_sets import write_mnist

from bnn_jax.stages.recipes import RECIPES
from bnn_jax.stages.stage import run_stages
from bnn_jax.training.checkpoint import checkpoint_steps, restore_checkpoint
from bnn_jax.training.config import Config, DataConfig, ModelConfig, OptimConfig
from bnn_jax.training.experiment import ImageInfo, make_experiment
from bnn_jax.training.input_pipeline import load_data
from bnn_jax.training.loop import train
from bnn_jax.training.programs import programs_of, state_shapes
from bnn_jax.training.step import init_state, train_step
from bnn_jax.training.validation import validate

FILE = Path(__file__).with_suffix(".json")


def unit(match: re.Match) -> str:
    """The unit of which a layer in a block of two was a part, and the layer's name there."""
    stage, block, layer, position = match.groups()
    return f"{stage}_unit{2 * int(block) - 2 + int(position or 1)}/{layer}"


UNITS = "e?bireal|ftbnn|irnet|reactnet(18|_resnet20)|dgrl"
STEMS = (
    f"(?!.*bn_free)({UNITS})|(bnn_|xnor_|xnor_pp_|tbn_)?resnet(18|34)|real_to|cinet|binaryduo_resnet|igp|binary_dense"
)
RENAMED: tuple[tuple[str, str, str | Callable[[re.Match], str]], ...] = (
    (UNITS, r"^(stage\d)_block(\d+)/(conv|norm|activation|branch)(\d)(?=/|_gain)", unit),
    (UNITS, r"^(stage\d)_block(\d+)/(downsample\w*)()(?=/)", unit),
    ("ftbnn", r"/activation/", "/prelu/"),
    ("e?bireal|ftbnn|irnet|(bnn_|xnor_|xnor_pp_|tbn_)?resnet(18|34)", r"/downsample_norm/", "/norm_downsample/"),
    ("real_to", r"_block(\d+)/conv(\d)_scale/", lambda m: f"_block{m[1]}{' ab'[int(m[2])]}/scale/"),
    ("real_to", r"_block(\d+)/([a-z]+)(\d)/", lambda m: f"_block{m[1]}{' ab'[int(m[3])]}/{m[2]}/"),
    ("real_to", r"_block(\d+)/downsample", r"_block\1a/downsample"),
    (STEMS, r"^stem/(?!norm|activation)", "stem/conv/"),
    (STEMS, r"^stem_", "stem/"),
)
"""(pattern of names of networks, pattern of a parameter's path now, what replaces it), applied in turn."""

DIGITS = Config(
    name="golden",
    epochs=2,
    batch_size=64,
    data=DataConfig("digits", crop_padding=1),
    model=ModelConfig("resnet6", width=8),
    diagnostics=replace(Config("golden", 1, 1).diagnostics, every_steps=10),
)
RUNS: dict[str, Config] = {
    "dfw": replace(DIGITS, optim=OptimConfig("dfw", 3.0)),
    "dfw_inner_steps": replace(DIGITS, optim=OptimConfig("dfw", 1.0, inner_steps=4, schedule="cosine")),
    "adam": replace(DIGITS, optim=OptimConfig("adam", 0.03, weight_decay=1e-4, schedule="cosine")),
    "sgd": replace(DIGITS, optim=OptimConfig("sgd", 0.3), regularizer="manhattan", regularizer_strength=1e-5),
    "bop": replace(DIGITS, optim=OptimConfig("bop", 0.01)),
    "bnew": replace(DIGITS, optim=OptimConfig("bnew", 0.01)),
}
NETWORKS = (
    "lenet",
    "vgg_small",
    "xnor_resnet18",
    "bireal_resnet20",
    "irnet_resnet20",
    "reactnet_a",
    "real_to_binary_resnet18",
    "binary_densenet28",
    "igp_resnet21",
    "cinet_resnet18",
)


def old_name(path: str, network: str) -> str:
    """What a parameter of a network was called when the hashes were made."""
    for networks, now, then in RENAMED:
        path = re.sub(now, then, path) if re.match(networks, network) else path
    return path


@contextmanager
def started_by_old_names(network: str) -> Iterator[None]:
    """Let Flax derive the random start of a network from what its modules were called when the hashes were made."""

    def fold(key, data):
        names = "/".join(name for name in data if isinstance(name, str))
        old = old_name(f"{names}/", network)[:-1] if names else ""
        return fold_in_static(key, (*old.split("/"), *data[len(names.split("/")) :]) if names else data)

    fold_in_static = flax.core.scope._fold_in_static
    flax.core.scope._fold_in_static = fold
    try:
        yield
    finally:
        flax.core.scope._fold_in_static = fold_in_static


def hash_of(arrays: dict[str, np.ndarray]) -> str:
    """SHA-256 of arrays in the order of their names."""
    digest = hashlib.sha256()
    for _, array in sorted(arrays.items()):
        array = np.asarray(array)
        digest.update(f"{array.dtype} {array.shape}\n".encode())
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()


def hash_of_run(config: Config, workdir: Path) -> str:
    """The hash of the parameters of the newest checkpoint."""
    like = state_shapes(programs_of(validate(config), load_data(config.data)))
    assert checkpoint_steps(workdir / "checkpoints"), workdir
    state = restore_checkpoint(workdir / "checkpoints", like).state
    flat = flatten_dict(state.train.params, sep="/")
    return hash_of({old_name(path, config.model.name): array for path, array in flat.items()})


def short_run(name: str) -> str:
    """The hash of the final parameters of a run of RUNS."""
    with tempfile.TemporaryDirectory() as folder:
        train(RUNS[name], folder)
        return hash_of_run(RUNS[name], Path(folder))


def recipe_run() -> str:
    """The hash of the last stage of DIR-Net's recipe, which is taught by its first."""
    stages = RECIPES["dir_net"](DIGITS)
    with tempfile.TemporaryDirectory() as folder, started_by_old_names(stages[-1].config.model.name):
        run_stages(stages, folder)
        return hash_of_run(stages[-1].config, Path(folder) / stages[-1].name)


def streamed_run() -> str:
    """The hash of a run whose images are read from disk while it trains."""
    with tempfile.TemporaryDirectory() as folder:
        write_mnist(Path(folder) / "data", train=200, test=30)
        data = DataConfig("mnist", data_dir=str(Path(folder) / "data"), stream=True, crop_padding=2)
        config = replace(RUNS["dfw"], data=data, batch_size=32, scan_steps=2)
        train(config, Path(folder) / "run")
        return hash_of_run(config, Path(folder) / "run")


def network_after_a_step(name: str) -> str:
    """The hash of a network's logits after one step from kernels that its parameters' old names decide."""
    side = SIDES.get(name, 8)
    info = ImageInfo((side, side, 3), 10, (0.5,) * 3, (0.25,) * 3)
    config = validate(Config("golden", 1, 4, loss="cross_entropy", model=small(name), optim=OptimConfig("sgd", 0.05)))
    experiment = make_experiment(config, info, total_steps=10)
    shapes = jax.eval_shape(partial(init_state, experiment), 0).params
    kernels = {}
    for path, leaf in flatten_dict(shapes, sep="/").items():
        if path.rpartition("/")[2] in ("kernel", "latent_kernel"):
            seed = int.from_bytes(hashlib.sha256(old_name(path, name).encode()).digest()[:4], "big")
            scale = (2 / np.prod(leaf.shape[:-1])) ** 0.5
            kernels[path] = np.random.default_rng(seed).normal(0, scale, leaf.shape).astype(np.float32)
    rng = np.random.default_rng(0)
    images, labels = rng.integers(0, 256, (4, side, side, 3), dtype=np.uint8), jnp.arange(4)

    @jax.jit
    def run(kernels, images, labels):
        state = init_state(experiment, 0, {"params": kernels})
        state, _ = train_step(experiment, state, images, labels)
        variables = {"params": state.params} | state.model_state
        logits, _ = experiment.model.apply(variables, images / 255.0 - 0.5, train=False)
        return logits

    with started_by_old_names(name):
        logits = run(unflatten_dict(kernels, sep="/"), images, labels)
    assert np.isfinite(logits).all() and np.ptp(logits) > 0, name
    return hash_of({"logits": np.asarray(logits)})


GOLDEN: dict[str, Callable[[], str]] = {
    **{f"run/{name}": partial(short_run, name) for name in RUNS},
    "run/recipe_with_teacher": recipe_run,
    "run/streamed": streamed_run,
    **{f"network/{name}": partial(network_after_a_step, name) for name in NETWORKS},
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--write", action="store_true", help="make the file instead of comparing with it")
    parser.add_argument("names", nargs="*", help="of those to make; all by default")
    arguments = parser.parse_args()
    known = json.loads(FILE.read_text()) if FILE.exists() else {"jax": jax.__version__, "hashes": {}}
    if not arguments.write and known["jax"] != jax.__version__:
        print(f"the hashes are of jax {known['jax']}, this is {jax.__version__}")
    differing = 0
    for name in arguments.names or GOLDEN:
        found = GOLDEN[name]()
        equal = known["hashes"].get(name) == found
        differing += not equal
        print(f"{name}: {found[:16]} {'' if arguments.write else 'equal' if equal else 'DIFFERS'}", flush=True)
        if arguments.write:
            known["hashes"][name] = found
    if arguments.write:
        FILE.write_text(json.dumps(known | {"jax": jax.__version__}, indent=1) + "\n")
        return 0
    print(f"{differing} of {len(arguments.names or GOLDEN)} differ")
    return 1 if differing else 0


if __name__ == "__main__":
    sys.exit(main())
