"""What is done to a batch of images inside jit: normalisation, random crop, random flip.  Pure functions of a key."""

import operator
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Shaped

from bnn_jax.types import Images, Key


def normalize(
    images: Images, *, mean: Sequence[float], std: Sequence[float], dtype: jnp.dtype = jnp.float32
) -> Float[Array, "batch height width channels"]:
    """(images - mean) / std, channel by channel, computed in float32 and returned as `dtype`.

    Args:
      images: [N,H,W,C], values 0..255.
      mean: C numbers in units of 0..255.
      std: C numbers in units of 0..255, not 0.
      dtype: of the result.

    Raises:
      ValueError: when `mean` or `std` does not have one number for each channel.

    >>> normalize(jnp.array([[[[100, 30]]]], jnp.uint8), mean=(80.0, 40.0), std=(10.0, 20.0))
    Array([[[[ 2. , -0.5]]]], dtype=float32)
    """
    channels = images.shape[-1]
    for name, values in {"mean": mean, "std": std}.items():
        if np.shape(values) != (channels,):
            raise ValueError(f"`{name}` has shape {np.shape(values)}; it must be ({channels},), one for each channel")
    mean, std = (jnp.asarray(values, jnp.float32).reshape(1, 1, 1, channels) for values in (mean, std))
    return ((images.astype(jnp.float32) - mean) / std).astype(dtype)


def random_crop(
    key: Key, images: Shaped[Array, "batch height width channels"], *, padding: int
) -> Shaped[Array, "batch height width channels"]:
    """Pad each side with `padding` zeros and cut a window of the original size, anew for each image.

    y[n,i,j] = padded[n, i + a_n, j + b_n],  a_n, b_n independent and uniform in 0..2 padding

    Crop after :func:`normalize`: then the zeros outside are the mean pixel.

    Raises:
      ValueError: for a negative `padding`, or `images` that are not [N,H,W,C].

    Reference: He et al., Deep Residual Learning for Image Recognition, 2016, arXiv:1512.03385, section 4.2 (padding 4).
    """
    _check_batch(images)
    if operator.index(padding) < 0:
        raise ValueError(f"`padding` (={padding}) must not be negative; 0 switches the crop off")
    if padding == 0:
        return images
    padded = jnp.pad(images, ((0, 0), (padding, padding), (padding, padding), (0, 0)))
    offsets = jax.random.randint(key, (images.shape[0], 2), 0, 2 * padding + 1)
    window = lambda image, offset: lax.dynamic_slice(image, (offset[0], offset[1], 0), images.shape[1:])
    return jax.vmap(window)(padded, offsets)


def random_flip(
    key: Key, images: Shaped[Array, "batch height width channels"]
) -> Shaped[Array, "batch height width channels"]:
    """Mirror each image left to right with probability 1/2, independently.

    Raises:
      ValueError: for `images` that are not [N,H,W,C].

    Reference: He et al., 2016, arXiv:1512.03385, section 4.2.
    """
    _check_batch(images)
    mirrored = jax.random.bernoulli(key, 0.5, (images.shape[0], 1, 1, 1))
    return jnp.where(mirrored, images[:, :, ::-1], images)


def augment(
    key: Key, images: Shaped[Array, "batch height width channels"], *, padding: int, flip: bool
) -> Shaped[Array, "batch height width channels"]:
    """:func:`random_crop`, then :func:`random_flip` if `flip`; `padding` 0 and no flip is the identity.

    Raises:
      ValueError: for a negative `padding`, or `images` that are not [N,H,W,C].
    """
    crop_key, flip_key = jax.random.split(key)
    images = random_crop(crop_key, images, padding=padding)
    return random_flip(flip_key, images) if flip else images


def _check_batch(images: Shaped[Array, "..."]) -> None:
    if images.ndim != 4:
        raise ValueError(f"`images` has shape {images.shape}; it must be [N,H,W,C]")
