"""Look at what was trained: reports, pictures and provenance of comparisons."""
