"""edgelm: small language models on a board."""
