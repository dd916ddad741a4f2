"""Many runs: grids of settings, seeds, comparisons."""
