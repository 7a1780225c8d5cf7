"""A bundle on disk: matrices, graph and manifest, staged_directory and renamed into place."""
