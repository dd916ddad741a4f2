"""A made-up set with ImageNet's features, to try out and to time training from disk: written without TensorFlow.

Photographs take the form of coloured gratings whose direction, width and colour say the class, so that a network can
learn them; they differ in size and shape, some are grey, some CMYK, and some files are cut short.
"""

import io
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8

from bnn_jax.checks import require
from bnn_jax.data.prepare import import_tfds, write_examples
from bnn_jax.data.splits import permutation
from bnn_jax.errors import UsageError
from bnn_jax.paths import local_path

VERSION = "5.1.0"
"""Of imagenet2012 in TFDS, whose features these are."""

NOISE = 20.0
"""Standard deviation of the noise on every pixel; it gives a photograph of 500x375 about 100 KB, as ImageNet's have."""

QUALITY = 90


def write_synthetic_imagenet(
    data_dir: str | Path,
    *,
    name: str = "imagenet2012",
    train_examples: int = 2000,
    validation_examples: int = 200,
    classes: int = 1000,
    corrupt: int = 1,
    grey: float = 0.05,
    cmyk: float = 0.02,
    short_side: tuple[int, int] = (200, 500),
    aspect: tuple[float, float] = (0.5, 2.0),
    seed: int = 0,
) -> Path:
    """Write a TFDS folder of ArrayRecord files with the features `file_name`, `image` (JPEG) and `label`.

    The folder gets its name when it is complete.  The same arguments give the same images.

    Args:
      data_dir: folder of TFDS sets.
      name: of the set.
      train_examples, validation_examples: sizes of the splits; labels go round the classes.
      classes: how many.
      corrupt: files of each split that are cut short.
      grey, cmyk: shares of each split in these colour spaces, rounded up.
      short_side: the least and the greatest length of the shorter side, in pixels.
      aspect: the least and the greatest width / height; drawn uniformly in the logarithm.
      seed: of sizes, noise and places.

    Returns:
      The folder of the set, `<data_dir>/<name>/5.1.0`.

    Raises:
      UsageError: for a number out of range, or a set that is there already.
      RunError: when it cannot be written.
    """
    data_dir = local_path("data_dir", data_dir)
    sizes = {"train": train_examples, "validation": validation_examples}
    _check(name, sizes, classes, corrupt, grey, cmyk, short_side, aspect, seed)
    folder = data_dir / name / VERSION
    if folder.exists():
        raise UsageError(f"{folder} exists already; delete it to write it anew, or give another `data_dir`")

    def examples(split):
        count = sizes[split]
        # Which are corrupt, grey and CMYK: these many at the front of a random order.
        order = permutation(count, seed=2 * seed + (split == "train"))
        kinds = ["corrupt"] * corrupt + ["L"] * _share(grey, count) + ["CMYK"] * _share(cmyk, count)
        special = dict(zip(order.tolist(), kinds))
        for index in range(count):
            random = np.random.default_rng([seed, split == "train", index])
            kind, label = special.get(index, "RGB"), index % classes
            image = grating(label, *_random_size(random, short_side, aspect), random=random)
            encoded = _jpeg(image, "RGB" if kind == "corrupt" else kind)
            file_name = f"{name}_{split}_{index:08d}.JPEG"
            encoded = encoded[: len(encoded) // 2] if kind == "corrupt" else encoded
            yield file_name, {"file_name": file_name, "image": encoded, "label": label}

    builder = _builder(name, classes, data_dir, dict.fromkeys(sizes, examples))
    write_examples(builder, folder)
    return folder


def grating(label: int, height: int, width: int, *, random: np.random.Generator) -> UInt8[np.ndarray, "height width 3"]:
    """Stripes with noise; the digits of `label` decide direction, width (a third to a tenth of the side) and colour."""
    direction, frequency, colour = label % 10, label // 10 % 10, label // 100 % 10
    angle = math.pi * direction / 10
    waves = (3 + 0.7 * frequency) / max(height, width)
    y = math.sin(angle) * np.arange(height, dtype=np.float32)[:, None]
    x = math.cos(angle) * np.arange(width, dtype=np.float32)
    stripes = np.sin(2 * math.pi * (waves * (x + y) + random.random()))[..., None]
    tint = 0.5 + 0.5 * np.cos(2 * math.pi * (colour / 10 + np.arange(3) / 3))
    noise = NOISE * random.standard_normal((height, width, 3), dtype=np.float32)
    return np.clip(128 + 90 * stripes * tint.astype(np.float32) + noise, 0, 255).astype(np.uint8)


def _random_size(random: np.random.Generator, short_side, aspect) -> tuple[int, int]:
    """(height, width)"""
    short = int(random.integers(short_side[0], short_side[1] + 1))
    shape = math.exp(random.uniform(math.log(aspect[0]), math.log(aspect[1])))
    return (short, max(short, round(short * shape))) if shape >= 1 else (max(short, round(short / shape)), short)


def _jpeg(image: np.ndarray, mode: str) -> bytes:
    from PIL import Image

    encoded = io.BytesIO()
    Image.fromarray(image).convert(mode).save(encoded, "JPEG", quality=QUALITY)
    return encoded.getvalue()


def _builder(name: str, classes: int, data_dir: Path, splits: dict[str, Any]) -> Any:
    tfds = import_tfds()

    def info(self):
        features = {
            "file_name": tfds.features.Text(),
            "image": tfds.features.Image(encoding_format="jpeg"),
            "label": tfds.features.ClassLabel(num_classes=classes),
        }
        description = "Made-up images with the features of imagenet2012."
        return tfds.core.DatasetInfo(
            builder=self,
            features=tfds.features.FeaturesDict(features),
            supervised_keys=("image", "label"),
            description=description,
        )

    methods = {
        "VERSION": tfds.core.Version(VERSION),
        "name": name,
        "_info": info,
        "_split_generators": lambda self, _: {split: self._generate_examples(split) for split in splits},
        "_generate_examples": lambda self, split: splits[split](split),
    }
    with tfds.core.registered.skip_registration():
        builder_class = type("SyntheticImagenet", (tfds.core.GeneratorBasedBuilder,), methods)
    return builder_class(data_dir=data_dir, file_format="array_record")


def _share(share: float, count: int) -> int:
    """So many of `count`, rounded up, but for what floats add to a whole number."""
    return math.ceil(round(share * count, 6))


def _check(set_name, sizes, classes, corrupt, grey, cmyk, short_side, aspect, seed) -> None:
    smallest = min(sizes.values())
    special = corrupt + sum(_share(share, smallest) for share in (grey, cmyk) if 0 <= share <= 1)
    for name, value, holds, rule in (
        ("name", set_name, bool(re.fullmatch(r"\w[\w.-]*", set_name)), "must be made of letters, digits, _, - and ."),
        ("train_examples", sizes["train"], sizes["train"] >= 1, "must be at least 1"),
        ("validation_examples", sizes["validation"], sizes["validation"] >= 1, "must be at least 1"),
        ("classes", classes, classes >= 1, "must be at least 1"),
        ("seed", seed, seed >= 0, "must not be negative"),
        ("grey", grey, 0 <= grey <= 1, "must be a share, 0 to 1"),
        ("cmyk", cmyk, 0 <= cmyk <= 1, "must be a share, 0 to 1"),
        ("corrupt", corrupt, corrupt >= 0, "must not be negative"),
        (
            "corrupt",
            corrupt,
            special < smallest,
            f"must leave ordinary images: with grey and CMYK ones it makes {special} of the {smallest} of a split",
        ),
        ("short_side", short_side, 1 <= short_side[0] <= short_side[1], "must be two lengths, the lesser one first"),
        ("aspect", aspect, 0 < aspect[0] <= aspect[1] < math.inf, "must be two positive ratios, the lesser one first"),
    ):
        require(name, value, holds, rule, error=UsageError)
