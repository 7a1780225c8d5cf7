"""The built-in bundle, as package data: `edgelm.bundle.open_bundle("builtin")` opens it."""
