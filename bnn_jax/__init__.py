"""bnn_jax."""
