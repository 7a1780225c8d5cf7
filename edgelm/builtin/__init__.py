"""The built-in bundle, as package data: `edgelm.bundle.manifest.open_bundle("builtin")` opens it."""
