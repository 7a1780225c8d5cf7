"""The unquantized model, run piece by piece, and what it tells: calibration, sensitivity, the quality gate."""
