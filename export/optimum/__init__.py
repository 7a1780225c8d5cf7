"""Architectures without a module of their own: optimum's export, then our quantizer."""
