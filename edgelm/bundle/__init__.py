"""The on-disk bundle format, of which this package is the sole owner; the user's bundles; the model catalogue."""
