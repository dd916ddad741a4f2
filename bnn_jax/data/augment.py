"""What is done to a batch of images inside jit: normalisation, crop, flip, lighting.  Pure functions of a key."""

import operator
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int, Num, Shaped

from bnn_jax.checks import check_arrays, require
from bnn_jax.types import Key

EIGENVALUES = (0.2175, 0.0188, 0.0045)
EIGENVECTORS = ((-0.5675, 0.7192, 0.4009), (-0.5808, -0.0045, -0.8140), (-0.5836, -0.6948, 0.4203))
"""Principal components of the RGB values 0..1 of ImageNet's training images: a column each, a row for each channel.

As published with fb.resnet.torch (Gross and Wilber, Training and investigating Residual Nets, 2016).
"""


@check_arrays
def normalize(
    images: Num[Array, "batch *spatial channels"],
    *,
    mean: Sequence[float],
    std: Sequence[float],
    dtype: jnp.dtype = jnp.float32,
) -> Float[Array, "batch *spatial channels"]:
    """(images - mean) / std, channel by channel, computed in float32 and returned as `dtype`.

    Args:
      images: [N,H,W,C], or with other spatial axes, values 0..255.
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
    per_channel = (1,) * (images.ndim - 1) + (channels,)
    mean, std = (jnp.asarray(values, jnp.float32).reshape(per_channel) for values in (mean, std))
    return ((images.astype(jnp.float32) - mean) / std).astype(dtype)


@check_arrays
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
    require("padding", padding, operator.index(padding) >= 0, "must not be negative", "0 switches the crop off")
    if padding == 0:
        return images
    padded = jnp.pad(images, ((0, 0), (padding, padding), (padding, padding), (0, 0)))
    offsets = jax.random.randint(key, (images.shape[0], 2), 0, 2 * padding + 1)
    window = lambda image, offset: lax.dynamic_slice(image, (offset[0], offset[1], 0), images.shape[1:])
    return jax.vmap(window)(padded, offsets)


@check_arrays
def random_area_crop(
    key: Key, images: Float[Array, "batch height width channels"], *, smallest: float
) -> Float[Array, "batch height width channels"]:
    r"""Cut a window of random area and shape from each image and resize it to the image's size, bilinearly.

    area a uniform in [smallest, 1] of the image, log r uniform between those of 3/4 and 4/3, height sqrt(a / r) and
    width sqrt(a r) of the image's, at most all of it, anywhere inside

    Windows begin and end between pixels.  :func:`bnn_jax.data.imagenet.random_box`, for images that are read from disk,
    draws whole pixels, and draws again where a window does not fit.

    Args:
      images: [N,H,W,C].
      smallest: share of the image's area, in (0, 1]; 0.08 is usual for ImageNet, 1 gives all of it.

    Raises:
      ValueError: for another `smallest`, or `images` that are not [N,H,W,C].

    Reference: Szegedy et al., Going Deeper with Convolutions, 2015, arXiv:1409.4842, section 6.
    """
    require("smallest", smallest, 0 < smallest <= 1, "must be in (0, 1]", "1 takes the whole image")
    if smallest == 1:
        return images
    count, height, width, channels = images.shape
    area_key, shape_key, place_key = jax.random.split(key, 3)
    area = jax.random.uniform(area_key, (count,), minval=smallest)
    shape = jnp.exp(jax.random.uniform(shape_key, (count,), minval=np.log(3 / 4), maxval=np.log(4 / 3)))
    sides = jnp.minimum(jnp.stack([jnp.sqrt(area / shape), jnp.sqrt(area * shape)], axis=1), 1)
    begin = jax.random.uniform(place_key, (count, 2)) * (1 - sides)

    def window(image, sides, begin):
        shift = -begin / sides * jnp.array([height, width], jnp.float32)
        return jax.image.scale_and_translate(
            image, (height, width, channels), (0, 1), 1 / sides, shift, "linear", antialias=False
        )

    return jax.vmap(window)(images, sides, begin)


@check_arrays
def random_flip(
    key: Key, images: Shaped[Array, "batch height width channels"]
) -> Shaped[Array, "batch height width channels"]:
    """Mirror each image left to right with probability 1/2, independently.

    Raises:
      ValueError: for `images` that are not [N,H,W,C].

    Reference: He et al., 2016, arXiv:1512.03385, section 4.2.
    """
    mirrored = jax.random.bernoulli(key, 0.5, (images.shape[0], 1, 1, 1))
    return jnp.where(mirrored, images[:, :, ::-1], images)


@check_arrays
def lighting(
    key: Key,
    images: Float[Array, "batch height width channels"],
    *,
    std: float,
    pixel_std: Sequence[float] = (1.0, 1.0, 1.0),
) -> Float[Array, "batch height width channels"]:
    """Add to all pixels of an image one random colour, along the principal components of ImageNet's colours.

    y[n,i,j,c] = x[n,i,j,c] + 255 / pixel_std_c sum_k V_ck a_nk lambda_k,  a_nk normal with mean 0, deviation std

    with lambda = :data:`EIGENVALUES` and V = :data:`EIGENVECTORS`.

    Args:
      images: [N,H,W,3], RGB; values 0..255, or these after :func:`normalize`.
      std: of the random weights; 0.1 in the paper.
      pixel_std: by what the values have been divided: 1 for values 0..255, the `std` of :func:`normalize` after it.

    Raises:
      ValueError: for a negative `std`, a `pixel_std` that is not three numbers, or `images` that are not [N,H,W,3].

    Reference: Krizhevsky, Sutskever, Hinton, ImageNet Classification with Deep Convolutional Neural Networks, 2012,
    section 4.1.
    """
    if images.shape[-1] != 3 or np.shape(pixel_std) != (3,):
        raise ValueError(
            f"`images` has {images.shape[-1]} channels and `pixel_std` shape {np.shape(pixel_std)}; lighting is for "
            "RGB, three of each"
        )
    require("std", std, std >= 0, "must not be negative", "0 switches lighting off")
    weights = std * jax.random.normal(key, (images.shape[0], 3)) * jnp.asarray([EIGENVALUES])
    colours = 255 * (weights @ jnp.asarray(EIGENVECTORS).T) / jnp.asarray([pixel_std], jnp.float32)
    return images + colours[:, None, None, :].astype(images.dtype)


@check_arrays
def mixup(
    key: Key,
    images: Float[Array, "batch height width channels"],
    labels: Int[Array, "batch"],
    *,
    alpha: float,
) -> tuple[Float[Array, "batch height width channels"], Int[Array, "batch"], Float[Array, ""]]:
    """Mix each image with another one of the batch.

    y_n = share x_n + (1 - share) x_p(n),  share drawn from Beta(alpha, alpha), p a random order, both once for a batch

    The loss goes with it: share L(f(y_n), label_n) + (1 - share) L(f(y_n), label_p(n)), for the cross-entropy that of
    the mixed one-hot labels.

    Args:
      images: [N,H,W,C], after :func:`normalize`.
      labels: of the images.
      alpha: 0.2 to 1 is usual.

    Returns:
      The mixed images, the labels of the others, and the share.

    Raises:
      ValueError: for an `alpha` that is not positive, or `images` that are not [N,H,W,C].

    Reference: Zhang et al., mixup: Beyond Empirical Risk Minimization, 2018, arXiv:1710.09412.
    """
    require("alpha", alpha, alpha > 0, "must be positive", "0.2 is usual")
    share_key, order_key = jax.random.split(key)
    share = jax.random.beta(share_key, alpha, alpha)
    order = jax.random.permutation(order_key, len(images))
    mixed = share * images + (1 - share) * images[order]
    return mixed.astype(images.dtype), labels[order], share


@check_arrays
def augment(
    key: Key,
    images: Shaped[Array, "batch height width channels"],
    *,
    padding: int,
    flip: bool,
    smallest_area: float = 1.0,
    lighting_std: float = 0.0,
    pixel_std: Sequence[float] | None = None,
) -> Shaped[Array, "batch height width channels"]:
    """:func:`random_area_crop`, :func:`random_crop`, :func:`random_flip` if `flip`, :func:`lighting`, in this order.

    `smallest_area` 1, `padding` 0, no flip and `lighting_std` 0 is the identity.  Each draws what it draws without the
    others.

    Args:
      images: [N,H,W,C], after :func:`normalize`.
      padding, flip: of crop and flip.
      smallest_area: `smallest` of the area crop.
      lighting_std: `std` of lighting.
      pixel_std: the `std` that :func:`normalize` was given; needed by lighting.

    Raises:
      ValueError: for a negative `padding`, a `smallest_area` that is not in (0, 1], lighting without `pixel_std`, or
        `images` that are not [N,H,W,C].
    """
    crop_key, flip_key = jax.random.split(key)
    if smallest_area != 1:
        images = random_area_crop(jax.random.fold_in(crop_key, 1), images, smallest=smallest_area)
    images = random_crop(crop_key, images, padding=padding)
    images = random_flip(flip_key, images) if flip else images
    if not lighting_std:
        return images
    if pixel_std is None:
        raise ValueError(
            f"`pixel_std` (=None) must be the `std` of normalize where `lighting_std` (={lighting_std}) is set"
        )
    return lighting(jax.random.fold_in(flip_key, 1), images, std=lighting_std, pixel_std=pixel_std)
