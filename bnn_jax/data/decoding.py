"""From the bytes of an image file to pixels, with Pillow always, so that they are the same wherever it is decoded."""

import io
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from bnn_jax.data.imagenet import PREPROCESSING
from bnn_jax.errors import RunError, UsageError

if TYPE_CHECKING:
    from PIL.Image import Image


GREY = {"1", "L", "LA", "La", "I"}
"""Modes of Pillow; those of 16 bits begin with I too."""


def is_grey(image: "Image") -> bool:
    """Whether an image has no colour, by its mode."""
    return image.mode in GREY or image.mode.startswith("I;")


@dataclass
class Depth:
    """The largest value of the images of more than 8 bits in a set, over all of its splits.

    An array of 16 bits is read by the same rule, see :func:`bnn_jax.data.arrays.checked_arrays`.
    """

    largest: int | None = None

    def see(self, image: "Image") -> None:
        """Take an image as it is stored into account."""
        if image.mode.startswith("I"):
            self.largest = max(self.largest or 0, int(np.asarray(image).max()))

    @property
    def suspicion(self) -> str | None:
        """What is wrong if no value reaches the upper half of 16 bits, and the way out; None if one does."""
        if self.largest is None or self.largest >= 2**15:
            return None
        shift = max(0, self.largest.bit_length() - 8)
        mended = f"{f'(pixels >> {shift})' if shift else 'pixels'}.astype(np.uint8)"
        return f"no value above {self.largest}, and the upper 8 of 16 bits are taken; store 8 bits, {mended}"

    def check(self, where: str) -> None:
        """Refuse images of which it is not clear that the upper 8 of 16 bits are meant.

        Raises:
          RunError: for them.
        """
        if self.suspicion:
            raise RunError(f"the 16-bit images of {where} have {self.suspicion}")


def open_image(encoded: bytes) -> "Image":
    """An encoded image as it is stored."""
    from PIL import Image

    image = Image.open(io.BytesIO(encoded))
    image.load()
    return image


def decode_image(encoded: bytes, mode: str) -> "Image":
    """An encoded image as grey ("L") or "RGB", see :func:`in_mode`."""
    return in_mode(open_image(encoded), mode)


def in_mode(image: "Image", mode: str) -> "Image":
    """An image as grey ("L") or "RGB"; CMYK and palettes are converted, 16 bits become the upper 8.

    It is not turned as its camera noted, which torchvision does not do either.

    Raises:
      ValueError: for pixels that are floats or not of 16 bits, of which nobody knows the range.
    """
    from PIL import Image

    if image.mode == "F":
        raise ValueError("its pixels are floats; store 8 or 16 bits")
    if image.mode.startswith("I"):
        values = np.asarray(image)
        if values.min() < 0 or values.max() > 65535:
            raise ValueError("its pixels have more than 16 bits; store 8 or 16")
        image = Image.fromarray((values >> 8).astype(np.uint8))
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")
    return image if image.mode == mode else image.convert(mode)


def decode_all(
    encoded: Iterable[tuple[str, bytes]],
    count: int,
    mode: str,
    preprocess: Callable[["Image"], np.ndarray],
    where: str,
    depth: Depth,
) -> tuple[np.ndarray, set[str]]:
    """Decode the images of a split.

    Args:
      encoded: of each image what messages call it, and its bytes.
      count: how many there are.
      mode: "L" or "RGB".
      preprocess: what is done to each, as :func:`evaluation_of`.
      where: the split, for messages.
      depth: of the set, which sees each image.

    Returns:
      uint8 [N,H,W,C], and the formats that they were encoded in.

    Raises:
      RunError: if one cannot be decoded.
      UsageError: if they differ in size.
    """
    images, encodings = None, set()
    for index, (name, data) in enumerate(encoded):
        try:
            image = open_image(data)
            encodings.add(image.format)
            pixels = np.asarray(preprocess(in_mode(image, mode)))
            depth.see(image)
        except Exception as error:  # Pillow lets errors of a dozen types out of its parsers.
            reason = decoding_reason(error)
            raise RunError(f"{name} cannot be decoded ({reason}); copy or prepare the set again") from error
        if images is None:
            images = np.empty((count, *pixels.shape), np.uint8)
        if pixels.shape != images.shape[1:]:
            raise UsageError(
                f"images of {where} differ in size: {images.shape[1:3]} at index 0, {pixels.shape[:2]} at {index}; "
                "choose `data.preprocessing` center_crop and a `data.image_size`, or stream them with another one"
            )
        images[index] = pixels
    return images if images.ndim == 4 else images[..., None], encodings


def evaluation_of(preprocessing: str, size: int) -> Callable[["Image"], np.ndarray]:
    """What a preprocessing does to an image in evaluation; "none" leaves it as it is."""
    if preprocessing == "none":
        return np.asarray
    return lambda image: PREPROCESSING[preprocessing].evaluate(image, size)


def reason_of(error: Exception) -> str:
    """The text of `error` on one line; those of TFDS have several."""
    return " ".join(str(error).split())


def decoding_reason(error: Exception) -> str:
    """Why an image cannot be decoded, on one line."""
    from PIL import UnidentifiedImageError

    # Pillow's own words name an object by its address.
    return "no image format is known" if isinstance(error, UnidentifiedImageError) else reason_of(error)
