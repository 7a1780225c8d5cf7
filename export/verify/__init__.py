"""The quality gate and the self-check: a new bundle beside the unquantized model."""
