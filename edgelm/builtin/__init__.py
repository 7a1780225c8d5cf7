"""The built-in bundle, as package data: `edgelm.bundle.bundle_folder.open_bundle("builtin")` opens it."""
