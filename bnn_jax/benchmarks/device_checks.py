"""Equality on this machine's accelerator: products of codes in every form, gradients, packed networks, two runs alike.

``python -m bnn_jax.benchmarks.device_checks`` prints what it found as JSON, a line for each check; exit code 1 if
anything that has to be equal differs.
"""

import argparse
import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bnn_jax.benchmarks.training import CIFAR10
from bnn_jax.bitops.bits import pack
from bnn_jax.bitops.matmul import xor_counts
from bnn_jax.errors import RunError
from bnn_jax.layers.convolution import conv
from bnn_jax.models.build import build_model
from bnn_jax.packed import freeze, verify
from bnn_jax.training.config import Config, ModelConfig, OptimConfig
from bnn_jax.training.epoch import Batches
from bnn_jax.training.experiment import hyper_parameters
from bnn_jax.training.programs import make_programs

PRODUCTS = ((1, 64, 32), (100, 576, 64), (784, 1152, 128), (64, 4096, 1000))
"""(rows, size, columns) of the matrix products."""
CONVOLUTIONS = ((8, 32, 16, 1), (4, 17, 33, 2), (2, 8, 128, 1))
"""(batch, side, channels, stride) of the convolutions."""
FLAGS = {"default_flags": "", "deterministic_ops": "--xla_gpu_deterministic_ops=true"}
"""name -> XLA's flags with which two runs are compared."""


def signs(rng: np.random.Generator, *shape: int) -> np.ndarray:
    """Draw -1 and +1."""
    return np.where(rng.random(shape) < 0.5, -1.0, 1.0).astype(np.float32)


def differing_products(rng: np.random.Generator) -> dict[str, int]:
    """Entries of products of codes -1/+1 that differ from numpy's, for each form in which a layer may compute them."""
    differing = dict.fromkeys(("bits", "int8", "float32", "bfloat16"), 0)
    for rows, size, columns in PRODUCTS:
        x, y = signs(rng, rows, size), signs(rng, size, columns)
        exact = np.rint(x.astype(np.float64) @ y).astype(np.int64)
        counts = jax.jit(xor_counts)(pack(jnp.asarray(x > 0)), pack(jnp.asarray(y > 0), axis=0))
        found = {"bits": size - 2 * np.asarray(counts, np.int64)}
        for name, sums in (("int8", jnp.int32), ("float32", jnp.float32), ("bfloat16", jnp.float32)):
            operands = (jnp.asarray(code, name) for code in (x, y))
            found[name] = np.asarray(jnp.dot(*operands, preferred_element_type=sums), np.int64)
        for name, integers in found.items():
            differing[name] += int((integers != exact).sum())
    return differing


def differing_convolutions(rng: np.random.Generator) -> dict[str, int]:
    """Outputs of convolutions of codes that differ from a float64 product over patches, by dtype of the codes."""
    differing = dict.fromkeys(("float32", "bfloat16"), 0)
    for batch, side, channels, stride in CONVOLUTIONS:
        x, kernel = signs(rng, batch, side, side, channels), signs(rng, 3, 3, channels, channels)
        padded = np.pad(x.astype(np.float64), ((0, 0), (1, 1), (1, 1), (0, 0)))
        windows = np.lib.stride_tricks.sliding_window_view(padded, (3, 3), axis=(1, 2))[:, ::stride, ::stride]
        exact = np.rint(np.einsum("bhwcij,ijcf->bhwf", windows, kernel, optimize=True)).astype(np.int64)
        for dtype in differing:
            codes = (jnp.asarray(code, dtype) for code in (x, kernel))
            found = jax.jit(conv, static_argnums=(2, 3))(*codes, (stride, stride), ((1, 1), (1, 1)))
            differing[dtype] += int((np.asarray(found, np.int64) != exact).sum())
    return differing


def gradient_error(rng: np.random.Generator) -> float:
    """The largest difference of a convolution's gradients from the CPU's, relative to their largest entry."""
    x, kernel, g = signs(rng, 8, 16, 16, 32), signs(rng, 3, 3, 32, 32), rng.normal(size=(8, 16, 16, 32))

    def gradients(device):
        with jax.default_device(device), jax.default_matmul_precision("highest"):
            operands = (jnp.asarray(array, jnp.float32) for array in (x, kernel, g))
            back = jax.jit(lambda x, k, g: jax.vjp(lambda x, k: conv(x, k, (1, 1), ((1, 1), (1, 1))), x, k)[1](g))
            return [np.asarray(array, np.float64) for array in back(*operands)]

    pairs = zip(gradients(jax.devices()[0]), gradients(jax.devices("cpu")[0]))
    return max(float(np.abs(ours - cpu).max() / np.abs(cpu).max()) for ours, cpu in pairs)


def packed_network(rng: np.random.Generator) -> dict[str, Any]:
    """A small XNOR-ResNet with drawn weights on packed bits against the trained form, on images of CIFAR-10's shape."""
    model = build_model(name="resnet20", width=16, input_quantizer="ste_sign", kernel_quantizer="xnor", num_classes=10)
    images = jnp.asarray(rng.normal(size=(64, *CIFAR10.shape)), jnp.float32)
    variables = model.init(jax.random.key(0), images[:1], train=False)
    found = verify(model, variables, freeze(model, variables, images.shape[1:]), [images])
    layers = found.layers.values()
    return {
        "integers": sum(layer.integers for layer in layers),
        "differing_integers": sum(layer.differing_integers for layer in layers),
        "differing_predictions": found.differing_predictions,
        "passed": found.passed,
    }


def hash_of_training(steps: int, batch_size: int) -> str:
    """SHA-256 over the parameters of an XNOR ResNet-20 after some steps of Deep Frank-Wolfe on random images."""
    rng, examples = np.random.default_rng(0), 2 * batch_size
    images = jnp.asarray(rng.integers(0, 256, (examples, *CIFAR10.shape), dtype=np.uint8))
    labels = jnp.asarray(rng.integers(0, 10, examples, dtype=np.int32))
    order = jnp.asarray(rng.integers(0, examples, (steps, batch_size), dtype=np.int32))
    model = ModelConfig("resnet20", width=16, input_quantizer="ste_sign", kernel_quantizer="xnor")
    config = Config("checks", epochs=1, batch_size=batch_size, model=model, optim=OptimConfig("dfw", learning_rate=1.0))
    programs = make_programs(config, CIFAR10, examples=examples)
    state, _ = programs.train(programs.init(np.uint32(0)), Batches(images, labels, order), hyper_parameters(config))
    digest = hashlib.sha256()
    for leaf in jax.tree.leaves(state.params):
        digest.update(np.asarray(leaf).tobytes())
    return digest.hexdigest()


def determinism(steps: int, batch_size: int, flags: Mapping[str, str] = FLAGS) -> dict[str, bool | str]:
    """Whether two processes train to the same bits, by the names of XLA's flags; why not, where one of them failed."""
    found = {}
    for name, text in flags.items():
        try:
            found[name] = len({_hash_in_new_process(text, steps, batch_size) for _ in range(2)}) == 1
        except RunError as error:
            found[name] = str(error)
    return found


def _hash_in_new_process(flags: str, steps: int, batch_size: int) -> str:
    environment = os.environ | {"XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} {flags}".strip()}
    # Two processes share the device's memory with this one.
    environment |= {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    # Each compiles for itself: on a GPU what the compiler's timings choose is a part of the question.
    environment.pop("JAX_COMPILATION_CACHE_DIR", None)
    sizes = ["--steps", str(steps), "--batch-size", str(batch_size)]
    command = [sys.executable, "-m", "bnn_jax.benchmarks.device_checks", "--hash", *sizes]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        raise RunError(f"a process failed: {lines[-1]}")
    return done.stdout.split()[-1]


def check_device(
    *, steps: int = 20, batch_size: int = 128, on_found: Callable[[str, Any], None] = lambda name, found: None
) -> dict[str, Any]:
    """All of these checks; `equal` says whether what has to be equal on any machine is.

    Two runs with deterministic operations have to be alike, and two with the default flags need not.

    Args:
      steps: of the trainings that are compared.
      batch_size: of these.
      on_found: called after each check.
    """
    rng = np.random.default_rng(0)
    checks = {
        "device": lambda: jax.devices()[0].device_kind,
        "differing_products": lambda: differing_products(rng),
        "differing_convolutions": lambda: differing_convolutions(rng),
        "gradient_error": lambda: gradient_error(rng),
        "packed_network": lambda: packed_network(rng),
        "same_bits_in_two_runs": lambda: determinism(steps, batch_size),
    }
    found: dict[str, Any] = {}
    for name, check in checks.items():
        found[name] = check()
        on_found(name, found[name])
    exact = sum(found["differing_products"].values()) + sum(found["differing_convolutions"].values()) == 0
    alike = found["same_bits_in_two_runs"]["deterministic_ops"] is True
    equal = exact and alike and found["packed_network"]["passed"] and found["gradient_error"] < 1e-4
    on_found("equal", equal)
    return found | {"equal": equal}


def main() -> int:
    """Print the checks as JSON; the exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=20, help="of the trainings that are compared")
    parser.add_argument("--batch-size", type=int, default=128, help="of these trainings")
    parser.add_argument("--hash", action="store_true", help="print the hash of one such training alone")
    arguments = parser.parse_args()
    if arguments.hash:
        print(hash_of_training(arguments.steps, arguments.batch_size))
        return 0
    show = lambda name, found: print(json.dumps({name: found}), flush=True)
    found = check_device(steps=arguments.steps, batch_size=arguments.batch_size, on_found=show)
    return 0 if found["equal"] else 1


if __name__ == "__main__":
    sys.exit(main())
