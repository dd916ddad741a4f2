"""A computation read as a graph, without running it: what accounting, gradient paths and freezing stand on."""
