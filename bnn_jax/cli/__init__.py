"""The command `bnn-jax`: one file for each of its programs (parse, call, print), and what they share."""
