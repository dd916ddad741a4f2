"""Training a part: frozen leaves do not move and have no share in what the optimizer computes from the whole tree."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from bnn_jax.optim import OPTIMIZERS, DeepFrankWolfeState, deep_frank_wolfe, latent_box, make_optimizer
from bnn_jax.optim.frozen import is_trained, train_only

RNG = np.random.default_rng(0)
PARAMS = {
    "conv": {"latent_kernel": jnp.asarray(RNG.uniform(-1, 1, (3, 2)), jnp.float32)},
    "norm": {"scale": jnp.ones(2), "bias": jnp.full(2, 0.25)},
    "head": {"kernel": jnp.asarray(RNG.normal(size=(2, 3)), jnp.float32)},
}
GRADIENT = jax.tree.map(lambda w: jnp.cos(7 * w), PARAMS)
PATTERNS = ("*norm*", "conv/*")
PART = {name: PARAMS[name] for name in ("conv", "norm")}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_trained_part_moves_as_it_would_alone(name):
    """Two steps in the whole tree are those in the tree of the trained parameters, bit for bit."""
    made = make_optimizer(
        name, learning_rate=optax.constant_schedule(0.1), weight_decay=1e-3, box=latent_box(), total_steps=5
    )
    whole, alone = train_only(made, PATTERNS), optax.with_extra_args_support(made)
    params, part = PARAMS, PART
    state, part_state = whole.init(params), alone.init(part)
    for value in (0.7, 0.4):
        gradient = jax.tree.map(lambda g, w: g + 0.1 * w, GRADIENT, params)
        updates, state = whole.update(gradient, state, params, value=jnp.float32(value))
        of_part = {key: gradient[key] for key in part}
        part_updates, part_state = alone.update(of_part, part_state, part, value=jnp.float32(value))
        np.testing.assert_array_equal(updates["head"]["kernel"], 0)
        params, part = optax.apply_updates(params, updates), optax.apply_updates(part, part_updates)
        chex.assert_trees_all_equal({key: params[key] for key in part}, part)
    np.testing.assert_array_equal(params["head"]["kernel"], PARAMS["head"]["kernel"])
    assert (params["norm"]["scale"] != 1).all()
    assert sum(leaf.size for leaf in jax.tree.leaves(state)) == sum(leaf.size for leaf in jax.tree.leaves(part_state))


def test_the_step_size_of_deep_frank_wolfe_is_that_of_the_trained_parameters():
    """gamma = (L - eta delta.r) / (eta |delta|^2 + epsilon) over the trained leaves, in closed form."""
    optimizer = train_only(deep_frank_wolfe(0.5, 0.0, epsilon=1e-5), ("norm/*",))
    state = optimizer.init(PARAMS)
    _, state = optimizer.update(GRADIENT, state, PARAMS, value=jnp.float32(0.2))
    assert isinstance(state, DeepFrankWolfeState)
    norm = sum(float((np.asarray(g, np.float64) ** 2).sum()) for g in GRADIENT["norm"].values())
    assert float(state.gamma) == pytest.approx(0.2 / (0.5 * norm + 1e-5), rel=1e-5)
    everywhere = sum(float((np.asarray(g, np.float64) ** 2).sum()) for g in jax.tree.leaves(GRADIENT))
    assert everywhere > 2 * norm


def test_the_oracle_is_asked_about_displacements_without_the_frozen_part():
    asked = []

    def oracle(displacement):
        asked.append(jax.tree.structure(displacement))
        still = displacement["head"]["kernel"]
        return jax.tree.map(lambda g: g + still.sum(), GRADIENT), jnp.float32(0.3)

    optimizer = train_only(deep_frank_wolfe(0.5), PATTERNS)
    updates, _ = optimizer.update(
        GRADIENT, optimizer.init(PARAMS), PARAMS, value=jnp.float32(0.2), oracle=oracle, inner_steps=2
    )
    assert asked == [jax.tree.structure(PARAMS)] * len(asked)
    assert asked
    alone = deep_frank_wolfe(0.5)
    part_oracle = lambda displacement: ({key: GRADIENT[key] for key in PART}, jnp.float32(0.3))
    expected, _ = alone.update(
        {key: GRADIENT[key] for key in PART},
        alone.init(PART),
        PART,
        value=jnp.float32(0.2),
        oracle=part_oracle,
        inner_steps=2,
    )
    chex.assert_trees_all_equal({key: updates[key] for key in PART}, expected)


def test_patterns_are_of_whole_paths():
    assert is_trained(PARAMS, ("norm/*", "*/kernel")) == {
        "conv": {"latent_kernel": False},
        "norm": {"scale": True, "bias": True},
        "head": {"kernel": True},
    }
    with pytest.raises(
        ValueError, match=r"`train_only` \(='norm'\) matches none of the 4 parameters; .* as conv/latent"
    ):
        is_trained(PARAMS, ("head/*", "norm"))
