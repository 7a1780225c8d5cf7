"""Which parts of a board run a model, and the checks that prove it (`edgelm devices`)."""
