"""The quality gate and the self-check: a new bundle compared with the unquantized model."""
