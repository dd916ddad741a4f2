"""Variables of a network put together from arrays of other names and layouts; nothing is passed over in silence."""

import fnmatch
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import unflatten_dict

from bnn_jax.convert.target import Target, describe, module_and_leaf
from bnn_jax.errors import UsageError
from bnn_jax.types import LATENT_KERNEL

_KERNELS = {"kernel": LATENT_KERNEL, LATENT_KERNEL: "kernel"}


class Source(NamedTuple):
    """Where a variable comes from: names of arrays, and the function that makes it of them.

    Without names it is a constant of the source's conventions.
    """

    names: tuple[str, ...]
    make: Callable[..., np.ndarray]


def from_arrays(
    arrays: Mapping[str, Any],
    model: nn.Module,
    image_shape: Sequence[int],
    *,
    names: Mapping[str, str] | None = None,
    ignored: str | Sequence[str] = (),
    fresh: str | Sequence[str] = (),
) -> dict[str, Any]:
    """The variables of a network from arrays in this package's layouts, as those of an .npz file.

    Kernels are HWIO, or (inputs, features); see :func:`bnn_jax.convert.from_torch` for others.

    Args:
      arrays: name -> array.
      model: the network.
      image_shape: (height, width, channels) of its images.
      names: a variable, as params/conv1/latent_kernel, or its module, as conv1, -> the name of the array, or the part
        of it before the variable's own name; what is not in it has the same name in both.  `kernel` is taken where the
        network wants a `latent_kernel`, and the other way round.
      ignored: pattern, or patterns, of arrays that are not wanted, as "optimizer/*".
      fresh: pattern, or patterns, of variables, as params/head/*, that are left out, to be initialised.

    Raises:
      UsageError: listing the arrays that are missing, those that nothing wants, those of another shape, and those that
        hold other things than finite real numbers; for a key that is no name.
    """
    require_names("arrays", arrays)
    target, names = describe(model, image_shape), dict(names or {})
    known = {module_and_leaf(name)[0] for name in target.variables} | target.variables.keys()
    if unknown := sorted(names.keys() - known):
        raise UsageError(
            f"`names` has {_listed(unknown)}, which the network does not have; it has {_listed(sorted(known), most=12)}"
        )
    sources = {}
    for name in target.variables:
        module, leaf = module_and_leaf(name)
        theirs = names.get(name, f"{names[module]}/{leaf}" if module in names else name)
        other = f"{theirs.removesuffix(leaf)}{_KERNELS.get(leaf, leaf)}"
        theirs = theirs if theirs in arrays or other not in arrays else other
        sources[name] = Source((theirs,), lambda array: array)
    return assemble(arrays, target, sources, ignored=ignored, fresh=fresh)


def assemble(
    arrays: Mapping[str, Any],
    target: Target,
    sources: Mapping[str, Source],
    *,
    ignored: str | Sequence[str] = (),
    fresh: str | Sequence[str] = (),
    wrong: Sequence[str] = (),
) -> dict[str, Any]:
    """Make every variable of a network from its source, but those that are to start afresh.

    Raises:
      UsageError: listing what is missing, unknown, of another shape or no finite real number; `wrong` are complaints of
        the caller.
    """
    fresh, ignored = as_patterns("fresh", fresh), as_patterns("ignored", ignored)
    arrays = {name: as_numpy(array) for name, array in arrays.items()}
    left_out = {name for name in target.variables if any(fnmatch.fnmatch(name, p) for p in fresh)}
    ignored = [*ignored, *(theirs for name in left_out & sources.keys() for theirs in sources[name].names)]
    sources = {name: source for name, source in sources.items() if name not in left_out}
    wanted = {name for source in sources.values() for name in source.names}
    spare = [name for name in arrays if name not in wanted and not any(fnmatch.fnmatch(name, p) for p in ignored)]
    idle = [p for p in fresh if not fnmatch.filter(target.variables, p)]
    problems = [*wrong, *(f"`fresh` has {pattern!r}, which matches no variable" for pattern in idle)]
    if missing := sorted(wanted - arrays.keys()):
        problems.append(f"missing: {_listed(missing)}")
    if without := sorted(target.variables.keys() - sources.keys() - left_out):
        problems.append(f"not known where to find: {_listed(without)}")
    if spare:
        problems.append(f"unknown: {_listed(sorted(spare))}")
    found, kinds, shapes, broken = {}, [], [], []
    for name, like in target.variables.items():
        if name in sources and arrays.keys() >= set(sources[name].names):
            given = [arrays[theirs] for theirs in sources[name].names]
            if unreal := [f"{n} ({a.dtype})" for n, a in zip(sources[name].names, given) if not _is_real(a)]:
                kinds += unreal
                continue
            try:
                made = np.asarray(sources[name].make(*given))
            except UsageError:
                raise
            except ValueError:
                made = None
            if made is None or made.shape != like.shape:
                there = " and ".join(f"{theirs} {array.shape}" for theirs, array in zip(sources[name].names, given))
                shapes.append(f"{there} for {name} {like.shape}")
                continue
            with np.errstate(over="ignore", invalid="ignore"):
                found[name] = made.astype(like.dtype)
            if not (np.isfinite(made).all() and np.isfinite(found[name]).all()):
                broken += [f"{theirs} as {like.dtype}" for theirs in sources[name].names]
    problems += [f"not of real numbers: {_listed(kinds)}"] if kinds else []
    problems += [f"of another shape: {_listed(shapes)}"] if shapes else []
    problems += [f"not finite: {_listed(broken)}"] if broken else []
    if problems:
        raise UsageError(f"the weights do not fit the network; {'; '.join(problems)}; give the network's own settings")
    return unflatten_dict(found, sep="/")


def as_numpy(array: Any) -> np.ndarray:
    """An array of NumPy from one of NumPy, JAX or PyTorch, wherever it lies; half precision becomes single."""
    if hasattr(array, "detach"):
        array = array.detach().cpu().float().numpy() if array.is_floating_point() else array.detach().cpu().numpy()
    array = np.asarray(array)
    is_half = array.dtype.itemsize == 2 and jnp.issubdtype(array.dtype, jnp.floating)
    return array.astype(np.float32) if is_half else array


def as_patterns(argument: str, patterns: str | Sequence[str]) -> tuple[str, ...]:
    """Return the patterns that a sequence of them, or a single one, is.

    Raises:
      UsageError: for what is neither, naming the argument.

    >>> as_patterns("fresh", "params/head/*"), as_patterns("ignored", ["a*", "b*"])
    (('params/head/*',), ('a*', 'b*'))
    """
    several = (patterns,) if isinstance(patterns, str) or not isinstance(patterns, Iterable) else tuple(patterns)
    if not all(isinstance(pattern, str) for pattern in several):
        rule = "must be a pattern of names or several, as ['*/head/*']; () is none"
        raise UsageError(f"`{argument}` (={patterns!r}) {rule}")
    return several


def require_names(argument: str, arrays: Mapping[str, Any]) -> None:
    """Refuse what is no mapping, and arrays whose keys are no strings.

    Raises:
      UsageError: naming the argument, and what it is or the first such key.
    """
    if not isinstance(arrays, Mapping):
        way_out = "give `.state_dict()` of it" if hasattr(arrays, "state_dict") else "give a mapping name -> array"
        raise UsageError(f"`{argument}` is a {type(arrays).__name__}, which has no names of arrays; {way_out}")
    for key in arrays:
        if not isinstance(key, str):
            raise UsageError(f"`{argument}` has the key {key!r}, which is no name; give a mapping name -> array")


def _is_real(array: np.ndarray) -> bool:
    """Whether an array is of real numbers or truth values; bfloat16 and such are no kind of NumPy's."""
    return array.dtype.kind in "fiub" or jnp.issubdtype(array.dtype, jnp.floating)


def _listed(names: Sequence[str], most: int = 1000) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
