"""The on-disk bundle: its manifest, files and hashes; the models that are known by name. Sole owner of the format."""
