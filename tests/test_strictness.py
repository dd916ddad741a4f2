"""What the tests check of every call: the shapes and dtypes of its annotations, and that dtypes do not mix unsaid."""

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest
from strictness import checked

from bnn_jax.bitops.thresholds import above
from bnn_jax.layers.norm import affine
from bnn_jax.losses import cross_entropy
from bnn_jax.models.residual import subsample_and_pad
from bnn_jax.types import Logits


@pytest.mark.parametrize(
    ("call", "parameter"),
    [
        (lambda: affine(jnp.zeros((2, 3)), jnp.zeros((1, 3)), jnp.zeros(3)), "gain"),
        (lambda: above(jnp.zeros((2, 3), jnp.int32), jnp.zeros((), jnp.int32)), "threshold"),
        (lambda: subsample_and_pad(jnp.zeros((8, 8, 3)), 4, 2), "x"),
    ],
)
def test_a_tensor_of_the_wrong_rank_is_refused(call, parameter):
    with pytest.raises(jaxtyping.TypeCheckError, match=f"typechecking parameter '{parameter}'"):
        call()


def test_sizes_of_one_name_must_be_equal_and_dtypes_those_that_are_named():
    with pytest.raises(jaxtyping.TypeCheckError, match="typechecking parameter 'threshold'"):
        above(jnp.zeros((2, 3), jnp.int32), jnp.zeros(4, jnp.int32))
    with pytest.raises(jaxtyping.TypeCheckError, match="typechecking parameter 'threshold'"):
        above(jnp.zeros((2, 3), jnp.int32), jnp.zeros(3))
    assert cross_entropy(np.zeros((2, 3), np.float32), np.zeros(2, np.int32)).shape == (2,)


def test_only_arrays_are_checked_wherever_they_stand_in_an_annotation():
    def named(count: int) -> str:
        return "taken"

    @jaxtyping.jaxtyped(typechecker=checked)
    def found(pair: tuple[Logits, int] | None, count: int) -> str:
        return "taken"

    assert jaxtyping.jaxtyped(typechecker=checked)(named) is named
    assert found(None, "no number") == found((jnp.zeros((2, 3)), 1), 2) == "taken"
    with pytest.raises(jaxtyping.TypeCheckError):
        found((jnp.zeros(2), 1), 2)


def test_dtypes_do_not_mix_unsaid():
    with pytest.raises(jax.dtypes.TypePromotionError):
        jnp.ones(2, jnp.bfloat16) + jnp.ones(2)
    assert (jnp.ones(2, jnp.bfloat16) + 1.0).dtype == jnp.bfloat16
