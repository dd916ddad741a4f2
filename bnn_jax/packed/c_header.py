"""The arrays of a packed network as constants of C."""

import json
import os
import re
from collections.abc import Mapping

import numpy as np

from bnn_jax.files import write_atomically
from bnn_jax.packed.model import PackedModel
from bnn_jax.packed.named_arrays import STEPS, arrays
from bnn_jax.paths import local_path, require_ending

_TYPES = {"float32": "float", "int8": "int8_t", "int16": "int16_t", "int32": "int32_t", "bool": "uint8_t"}

_WORDS = """
auto break case char const continue default do double else enum extern float for goto if inline int long register
restrict return short signed sizeof static struct switch typedef union unsigned void volatile while
acos asin atan atan2 cbrt ceil copysign cos cosh erf erfc exp exp2 expm1 fabs fdim floor fma fmax fmin fmod frexp
gamma hypot ilogb j0 j1 jn ldexp lgamma log log10 log1p log2 logb lrint lround modf nan nearbyint pow remainder
rint round scalb scalbn significand signgam sin sinh sqrt tan tanh tgamma trunc y0 y1 yn
"""
"""Words of C and functions of math.h, which no constant of a program may be called."""


def write_header(path: str | os.PathLike[str], packed: PackedModel) -> None:
    """Write :func:`arrays` as a C header: a constant for each, and the steps in the comment at its head.

    A name is the array's with _ for whatever C does not take, as stage1_block1_conv1_kernel, and has the array's
    dimensions: ``stage1_block1_conv1_kernel[row][column][input][feature]``; a scalar has the dimension 1.  A word
    of C or math.h, as gamma, gets a _ behind it.

    Raises:
      ValueError: as :func:`arrays`, if two names become one, or for an array of another dtype.
      UsageError: if the name of the file ends as that of another format.
    """
    path = local_path("path", path)
    require_ending("path", path, ".h")
    write_atomically(path, header_text(arrays(packed), guard=_identifier(path.stem.upper()) + "_H"))


def header_text(found: Mapping[str, np.ndarray], *, guard: str) -> str:
    """The C header of what :func:`arrays` returns.

    >>> found = {"conv/scale": np.float32([0.5, 2]), "steps": np.array("[]")}
    >>> print(header_text(found, guard="NET_H").split("*/")[1].strip())
    #ifndef NET_H
    #define NET_H
    #include <math.h>
    #include <stdint.h>
    <BLANKLINE>
    static const float conv_scale[2] = {0.5f, 2.0f};
    <BLANKLINE>
    #endif
    """
    identifiers = {name: _identifier(name) for name in found if name != STEPS}
    if len({*identifiers.values()}) < len(identifiers):
        raise ValueError("`packed` has two arrays whose names are the same in C; rename a layer")
    lines = ["/* A network of bnn_jax. Kernels are [row][column][input][feature]; the logits are computed by", ""]
    for step in json.loads(str(found[STEPS])):
        inputs = ", ".join(identifiers.get(i, i) if isinstance(i, str) else f"{i:.9g}" for i in step["inputs"])
        options = "".join(f", {name} {json.dumps(value)}" for name, value in step["options"].items())
        lines.append(f"   {step['output']} = {step['op']}({inputs}{options})")
    lines += ["", "   as the documentation of bnn_jax.packed.arrays says. */", ""]
    lines += [f"#ifndef {guard}", f"#define {guard}", "#include <math.h>", "#include <stdint.h>", ""]
    for name, identifier in identifiers.items():
        array = np.atleast_1d(found[name])
        if array.dtype.name not in _TYPES:
            raise ValueError(f"`packed` has the array {name} of {array.dtype}, which has no type in C; save it as .npz")
        sides = "".join(f"[{side}]" for side in array.shape)
        lines.append(f"static const {_TYPES[array.dtype.name]} {identifier}{sides} = {_initializer(array)};")
    return "\n".join([*lines, "", "#endif", ""])


def _identifier(name: str) -> str:
    text = re.sub(r"\W", "_", name, flags=re.ASCII)
    text = f"_{text}" if text[:1].isdigit() else text
    return f"{text}_" if text in _WORDS.split() else text


def _initializer(array: np.ndarray) -> str:
    if array.ndim > 1:
        return "{" + ",\n".join(map(_initializer, array)) + "}"
    return "{" + ", ".join(map(_number, array)) + "}"


def _number(x: np.generic) -> str:
    if x.dtype.kind != "f":
        return str(int(x))
    if np.isinf(x):
        return "INFINITY" if x > 0 else "-INFINITY"
    return f"{float(str(x))!r}f"
