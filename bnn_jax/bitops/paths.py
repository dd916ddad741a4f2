"""Which way a packed layer multiplies codes: on bits, or as float32 numbers where bits do not pay."""

from typing import NamedTuple

PATHS = ON_BITS, AS_NUMBERS = ("bits", "float32")
"""Both give the same integers."""


class Bound(NamedTuple):
    """Products that are taken on bits.

    Attributes:
      groups: at most so many.
      channels, fan_in, features: at least so many, of each group.
    """

    groups: float
    channels: int
    fan_in: int
    features: int


# With a single channel a group there is one bit to a tap, and float32 numbers are multiplied tap by tap in one pass.
PAYING = (
    Bound(groups=1, channels=1, fan_in=1, features=1),
    Bound(groups=float("inf"), channels=2, fan_in=1, features=1),
)


def chosen_path(*, channels: int, fan_in: int, features: int, groups: int = 1) -> str:
    """The faster of PATHS for a product of two-valued codes.

    Args:
      channels: of the inputs that one feature is computed from.
      fan_in: the weights of one feature.
      features: of all groups.
      groups: of channels; as many as channels where the convolution is depthwise.

    >>> chosen_path(channels=64, fan_in=9 * 64, features=64), chosen_path(channels=1, fan_in=9, features=64, groups=64)
    ('bits', 'float32')
    """
    of_group = (channels, fan_in, features // groups)
    pays = (groups <= bound.groups and all(map(int.__ge__, of_group, bound[1:])) for bound in PAYING)
    return PATHS[0] if any(pays) else PATHS[1]
