"""A bundle on disk: matrices, graph and manifest, staged and renamed into place."""
