"""Writing a bundle: matrices, graph and manifest, in a staging directory that is renamed into place."""
