"""What the tests check of every call: the shapes and dtypes of its annotations, and that dtypes do not mix unsaid."""

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest
from strictness import checked

from bnn_jax.data.augment import lighting
from bnn_jax.distillation import distribution_loss
from bnn_jax.layers import mean_pool
from bnn_jax.losses import cross_entropy
from bnn_jax.types import Logits


@pytest.mark.parametrize(
    ("call", "parameter"),
    [
        (lambda: cross_entropy(jnp.zeros((2, 3, 4)), jnp.zeros(2, jnp.int32)), "logits"),
        (lambda: distribution_loss(jnp.zeros((2, 3)), jnp.zeros(3)), "teacher_logits"),
        (lambda: lighting(jax.random.key(0), jnp.zeros((8, 8, 3)), std=0.1), "images"),
        (lambda: mean_pool(jnp.zeros((8, 8, 3)), (2, 2), (2, 2)), "x"),
    ],
)
def test_a_tensor_of_the_wrong_rank_is_refused(call, parameter):
    with pytest.raises(jaxtyping.TypeCheckError, match=f"typechecking parameter '{parameter}'"):
        call()


def test_sizes_of_one_name_must_be_equal_and_dtypes_those_that_are_named():
    with pytest.raises(jaxtyping.TypeCheckError, match="typechecking parameter 'labels'"):
        cross_entropy(jnp.zeros((2, 3)), jnp.zeros(3, jnp.int32))
    with pytest.raises(jaxtyping.TypeCheckError, match="typechecking parameter 'labels'"):
        cross_entropy(jnp.zeros((2, 3)), jnp.zeros(2))
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
