"""From a photograph of any size to what a network for ImageNet takes: crops, resizing, and the published statistics.

A crop is random in training alone.  It is made with Pillow on the host, where images still differ in size; mirroring
and lighting follow inside jit (`bnn_jax.data.augment`).
"""

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple, TypeAlias

import numpy as np
from jaxtyping import UInt8

if TYPE_CHECKING:
    from PIL.Image import Image

MEAN = (0.485 * 255, 0.456 * 255, 0.406 * 255)
STD = (0.229 * 255, 0.224 * 255, 0.225 * 255)
"""Of the channels of ImageNet's training images, in units of 0..255, as torchvision and most papers give them."""

IMAGE_SIZE = 224
"""Height and width when no other is given."""

Draw: TypeAlias = Callable[[], float]
"""Gives the next number of a stream of random ones, uniform in [0, 1)."""

Pixels: TypeAlias = UInt8[np.ndarray, "size size *channels"]


class Preprocessing(NamedTuple):
    """How a photograph becomes size x size pixels.

    Attributes:
      train: (RGB image, random numbers, size) -> pixels.
      evaluate: (RGB image, size) -> pixels.
      is_random: whether training sees other pixels each time, for which images are read from disk again.
    """

    train: Callable[["Image", Draw, int], Pixels]
    evaluate: Callable[["Image", int], Pixels]
    is_random: bool = True


class Box(NamedTuple):
    """A rectangle of pixels."""

    top: int
    left: int
    height: int
    width: int


def uniform_draws(seed: int, epoch: int, index: int) -> Draw:
    """Random numbers that depend on nothing but (seed, epoch, index).

    The upper 53 bits of the words of Philox, a counter-based generator, with the key (seed, 0) and a counter that
    starts at (0, epoch, index, 0): NumPy promises these words for ever, those of its `Generator` only for a version.

    >>> a, b = uniform_draws(0, 1, 2), uniform_draws(0, 1, 2)
    >>> [a(), a()] == [b(), b()], 0 <= a() < 1
    (True, True)

    Reference: Salmon, Moraes, Dror, Shaw, Parallel Random Numbers: As Easy as 1, 2, 3, 2011.
    """
    words = np.random.Philox(key=np.array([seed, 0], np.uint64), counter=np.array([0, epoch, index, 0], np.uint64))
    return lambda: (int(words.random_raw()) >> 11) * 2.0**-53


def random_box(
    height: int,
    width: int,
    draw: Draw,
    *,
    scale: tuple[float, float] = (0.08, 1.0),
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
) -> Box:
    """A rectangle of random area and shape inside an image, as torchvision's RandomResizedCrop chooses it.

    area = a height width, a uniform in `scale`;  width / height = r, log r uniform in the logarithms of `ratio`

    The first of ten that fits is put at a uniformly random place; if none fits, the largest in the middle whose shape
    is within `ratio` is taken.

    Reference: Szegedy et al., Going Deeper with Convolutions, 2015, arXiv:1409.4842, section 6.
    """
    low, high = math.log(ratio[0]), math.log(ratio[1])
    for _ in range(10):
        area = height * width * (scale[0] + (scale[1] - scale[0]) * draw())
        shape = math.exp(low + (high - low) * draw())
        box_width, box_height = round(math.sqrt(area * shape)), round(math.sqrt(area / shape))
        if 0 < box_width <= width and 0 < box_height <= height:
            return Box(
                _below(draw, height - box_height + 1), _below(draw, width - box_width + 1), box_height, box_width
            )
    box_width = min(width, round(height * ratio[1])) if width / height > ratio[1] else width
    box_height = min(height, round(width / ratio[0])) if width / height < ratio[0] else height
    return Box((height - box_height) // 2, (width - box_width) // 2, box_height, box_width)


def random_resized_crop(image: "Image", draw: Draw, size: int) -> Pixels:
    """:func:`random_box` of the image, resized to size x size."""
    top, left, height, width = random_box(image.height, image.width, draw)
    return _resized(image.crop((left, top, left + width, top + height)), size, size)


def short_side(image: "Image", length: int) -> "Image":
    """The image resized so that its shorter side is `length`, the other in proportion and rounded down."""
    from PIL.Image import Resampling

    longer = length * max(image.size) // min(image.size)
    sizes = (length, longer) if image.width <= image.height else (longer, length)
    return image if image.size == sizes else image.resize(sizes, Resampling.BILINEAR)


def short_side_crop(image: "Image", draw: Draw, size: int) -> Pixels:
    """Shorter side to size 256/224, then a window of size x size at a random place."""
    return _random_window(short_side(image, _before_crop(size)), draw, size)


def short_side_center(image: "Image", size: int) -> Pixels:
    """Shorter side to size 256/224, then the window of size x size in the middle."""
    return _center_window(short_side(image, _before_crop(size)), size)


def square_crop(image: "Image", draw: Draw, size: int) -> Pixels:
    """Both sides to size 256/224, whatever the shape, then a window of size x size at a random place."""
    return _random_window(_square(image, size), draw, size)


def square_center(image: "Image", size: int) -> Pixels:
    """Both sides to size 256/224, whatever the shape, then the window of size x size in the middle."""
    return _center_window(_square(image, size), size)


def center_crop(image: "Image", size: int) -> Pixels:
    """Shorter side to size, then the square in the middle."""
    return _center_window(short_side(image, size), size)


PREPROCESSING: dict[str, Preprocessing] = {
    "resize_crop": Preprocessing(square_crop, square_center),
    "short_side_crop": Preprocessing(short_side_crop, short_side_center),
    "random_resized_crop": Preprocessing(random_resized_crop, short_side_center),
    "center_crop": Preprocessing(lambda image, draw, size: center_crop(image, size), center_crop, is_random=False),
}
"""name -> what is done in training and in evaluation.

resize_crop: images are resized to 256x256 and cropped to 224x224, as BNN+ writes (Darabi et al., 2018,
arXiv:1812.11800, section 4.2).
short_side_crop: the shorter side is resized to 256, as in the programs of XNOR-Net (Rastegari et al., 2016,
arXiv:1603.05279).
random_resized_crop: a random area and shape, as Bi-Real Net (Liu et al., 2018, arXiv:1808.00278) and ReActNet (Liu et
al., 2020, arXiv:2003.03488) train; evaluation as short_side_crop.
center_crop: the shorter side is resized to the image size and the square in the middle cut out, in training too; a set
is decoded once and kept in memory.
"""


def _before_crop(size: int) -> int:
    """256 for 224, and in proportion."""
    return round(size * 256 / 224)


def _square(image: "Image", size: int) -> "Image":
    from PIL.Image import Resampling

    side = _before_crop(size)
    return image if image.size == (side, side) else image.resize((side, side), Resampling.BILINEAR)


def _random_window(image: "Image", draw: Draw, size: int) -> Pixels:
    top, left = _below(draw, image.height - size + 1), _below(draw, image.width - size + 1)
    return np.asarray(image.crop((left, top, left + size, top + size)))


def _center_window(image: "Image", size: int) -> Pixels:
    top, left = round((image.height - size) / 2), round((image.width - size) / 2)
    return np.asarray(image.crop((left, top, left + size, top + size)))


def _resized(image: "Image", width: int, height: int) -> Pixels:
    from PIL.Image import Resampling

    return np.asarray(image.resize((width, height), Resampling.BILINEAR))


def _below(draw: Draw, count: int) -> int:
    """A whole number in 0..count-1."""
    return int(draw() * count)
