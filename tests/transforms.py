"""Steps of optax transforms, for the tests of optimizers."""

import jax
import jax.numpy as jnp
import optax


def training_step(optimizer):
    """(params, state, gradient) -> (params, state), jitted; the update is also given what no optimizer knows."""
    optimizer = optax.with_extra_args_support(optimizer)

    @jax.jit
    def step(params, state, gradient):
        updates, state = optimizer.update(gradient, state, params, value=jnp.float32(1.0), of_no_concern=1)
        return optax.apply_updates(params, updates), state

    return step


def scanned(optimizer, params, gradients):
    """The parameters and the state after each step on the rows of `gradients`, in one loop."""
    step = training_step(optimizer)

    def body(carry, gradient):
        carry = step(*carry, gradient)
        return carry, carry

    return jax.lax.scan(body, (params, optimizer.init(params)), gradients)[1]
