"""Which way a packed layer multiplies codes: on bits, or as float32 numbers where bits do not pay."""

from typing import NamedTuple

PATHS = ("bits", "float32")
"""Both give the same integers."""


class Bound(NamedTuple):
    """Products that are taken on bits.

    Attributes:
      groups: at most so many.
      fan_in, features: at least so many, of each group.
    """

    groups: int
    fan_in: int
    features: int


# The groups of a product on bits run one after the other, in float32 all at once.
PAYING = (
    Bound(groups=1, fan_in=1, features=1),
    Bound(groups=8, fan_in=256, features=16),
)


def chosen_path(*, fan_in: int, features: int, groups: int = 1) -> str:
    """The faster of PATHS for a product of two-valued codes.

    Args:
      fan_in: the weights of one feature.
      features: of all groups.
      groups: of channels; as many as channels where the convolution is depthwise.

    >>> chosen_path(fan_in=9 * 64, features=64), chosen_path(fan_in=9, features=64, groups=64)
    ('bits', 'float32')
    """
    pays = (
        groups <= bound.groups and fan_in >= bound.fan_in and features // groups >= bound.features for bound in PAYING
    )
    return PATHS[0] if any(pays) else PATHS[1]
