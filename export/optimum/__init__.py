"""Architectures without a file of their own: optimum's export, then our quantizer."""
