"""Feed damaged files to bnn_jax.packed.load: python tests/fuzz/fuzz_artifact.py --count 10000

Each is a good file with one kind of damage: flipped bits, overwritten, cut, inserted or exchanged bytes, an edited
header.  A few more are forged: something that they say is changed, and the hash made right again.  A damaged file must
be refused with one sentence; a forged one may also load, if what it describes is a network that fits its tensors.  Ends
with exit code 1 if anything else happens.
"""

import hashlib
import json
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import tyro

sys.path.insert(0, str(Path(__file__).parents[1]))
from damage import DAMAGE_OF_BYTES

from bnn_jax.compilation import use_compilation_cache
from bnn_jax.errors import RunError, UsageError, exit_code_of
from bnn_jax.models.build import build_model
from bnn_jax.packed import PackedModel, freeze, load, save

SETTINGS = {"name": "mnist_mlp", "width": 8, "options": {"hidden_layers": 2}}
IMAGE_SHAPE = (4, 4, 1)
REASONS = {
    "too few for a header": "shorter than 8 bytes",
    "claims a header of": "length of the header",
    "not that of a safetensors file": "header is no JSON of the right form",
    "holds no packed network": "another format",
    "format version": "another version",
    "its metadata are": "metadata missing or unknown",
    "its tensors claim": "size of the tensors",
    "not written as": "header in another writing",
    "SHA-256": "hash",
    "do not describe a network": "metadata of wrong types or values",
    "cannot be built": "no such network",
    "the network that it describes needs": "tensors of another network",
    "other variables than": "structure",
    "must be finite": "NaN or infinity",
}
"""Words of an error -> what it is counted as."""


@dataclass(frozen=True)
class Arguments:
    count: int = 10_000
    """Damaged files."""
    forged: int = 100
    """Files with changed metadata and a right hash; they take longer, for they are traced."""
    seed: int = 0
    path: Path | None = None
    """The good file; by default that of a small untrained network."""


def write_example(path: Path) -> None:
    """A file of the small network."""
    model = build_model(num_classes=3, **SETTINGS)
    images = jnp.zeros((1, *IMAGE_SHAPE))
    variables = jax.jit(lambda: model.init(jax.random.key(0), images, train=False))()
    frozen = freeze(model, variables, IMAGE_SHAPE)
    described = {"model": SETTINGS, "num_classes": 3, "image_shape": IMAGE_SHAPE, "mean": (120.0,), "std": (60.0,)}
    save(path, PackedModel(model, frozen, described))


def opened(data: bytes) -> tuple[dict, bytes]:
    """The header of a good file, and its tensors."""
    length = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def checksummed(header: dict, tensors: bytes) -> bytes:
    """A file with this header and tensors, and the right hash."""

    def written():
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        return len(text).to_bytes(8, "little") + text + tensors

    header["__metadata__"]["sha256"] = "0" * 64
    header["__metadata__"]["sha256"] = hashlib.sha256(written()).hexdigest()
    return written()


# -- damage: (rng, bytes) -> bytes


def edit_header(rng, data):
    """Characters of the header replaced, inserted or left out, and its length made right again."""
    length = int.from_bytes(data[:8], "little")
    text, tensors = data[8 : 8 + length], data[8 + length :]
    start, size = int(rng.integers(length)), int(rng.integers(0, 3))
    pieces = [
        b"",
        b" ",
        b"0",
        b"9" * 20,
        b"-1",
        b'"',
        b",",
        b"{}",
        b"[" * 2000,
        b"null",
        b"NaN",
        b"1e999",
        b"\\u0000",
        b"\xff",
    ]
    text = text[:start] + pieces[int(rng.integers(len(pieces)))] + text[start + size :]
    return len(text).to_bytes(8, "little") + text + tensors


def claim_more(rng, data):
    """A tensor or the header that claims up to exabytes."""
    claimed = int(2 ** rng.uniform(0, 64))
    if rng.random() < 0.3:
        return claimed.to_bytes(8, "little") + data[8:]
    header, tensors = opened(data)
    name = str(rng.choice([name for name in header if name != "__metadata__"]))
    entry = header[name]
    entry["shape"], entry["data_offsets"][1] = [claimed], entry["data_offsets"][0] + 4 * claimed
    text = json.dumps(header, separators=(",", ":")).encode()
    return len(text).to_bytes(8, "little") + text + tensors


DAMAGE = (*DAMAGE_OF_BYTES, edit_header, claim_more)


def forge(rng: np.random.Generator, data: bytes) -> bytes:
    """One value of the metadata or of a tensor's entry changed, and the hash made right."""
    header, tensors = opened(data)
    odd = [0, -1, 1, 3, 2**31, 2**63, 1e30, 0.5, True, None, "", "x", "resnet20", [], [1], [8, 8], {}, {"a": 1}, [[[]]]]
    value = odd[int(rng.integers(len(odd)))]
    if rng.random() < 0.3:
        entry = header[str(rng.choice([name for name in header if name != "__metadata__"]))]
        entry[str(rng.choice(list(entry)))] = value
        return checksummed(header, tensors)
    metadata = header["__metadata__"]
    key = str(rng.choice([key for key in metadata if key not in ("format", "format_version", "sha256")]))
    if key == "model":
        options = ("name", "width", "options", "input_quantizer", "kernel_quantizer", "kernel_quantizer_options", "new")
        value = json.loads(metadata[key]) | {str(rng.choice(options)): value}
    metadata[key] = json.dumps(value)
    return checksummed(header, tensors)


def outcome(path: Path, data: bytes) -> str:
    """What loading these bytes comes to: why they are refused, "loaded", or what must not be."""
    path.write_bytes(data)
    try:
        load(path)
    except (UsageError, RunError) as error:
        text = str(error)
        if str(path) not in text or "\n" in text:
            return f"UNCLEAR: {text!r}"
        return next((reason for words, reason in REASONS.items() if words in text), f"UNKNOWN: {text}")
    except Exception as error:  # Whatever else is raised is what this script looks for.
        return f"CRASH: {type(error).__name__}: {error}"
    return "loaded"


def fuzz(good: bytes, folder: Path, *, count: int, forged: int, seed: int) -> tuple[Counter[str], Counter[str]]:
    """How often loading came to what, of damaged and of forged files."""
    rng, path = np.random.default_rng(seed), folder / "damaged.bnn.safetensors"
    damaged_outcomes, forged_outcomes = Counter(), Counter()
    while damaged_outcomes.total() < count:
        data = DAMAGE[int(rng.integers(len(DAMAGE)))](rng, good)
        if data != good:
            damaged_outcomes[outcome(path, data)] += 1
    for _ in range(forged):
        forged_outcomes[outcome(path, forge(rng, good))] += 1
    return damaged_outcomes, forged_outcomes


def main() -> None:
    arguments = tyro.cli(Arguments, description=__doc__)
    use_compilation_cache()
    with tempfile.TemporaryDirectory() as folder:
        path = arguments.path or Path(folder, "good.bnn.safetensors")
        if arguments.path is None:
            write_example(path)
        load(path)
        began = time.perf_counter()
        damaged, forged = fuzz(
            path.read_bytes(), Path(folder), count=arguments.count, forged=arguments.forged, seed=arguments.seed
        )
        seconds = time.perf_counter() - began
    for title, outcomes in (("damaged", damaged), ("forged", forged)):
        print(f"{outcomes.total()} {title} files")
        for reason, times in outcomes.most_common():
            print(f"{times:8d}  {reason}")
    print(f"{seconds:.1f} s")
    bad = {reason for reason in damaged | forged if reason not in REASONS.values()} - {"loaded"}
    if bad or damaged["loaded"]:
        raise RunError(f"{len(bad)} kinds of refusals are not clean, {damaged['loaded']} damaged files were loaded")


if __name__ == "__main__":
    sys.exit(exit_code_of(main))
