"""Logit steps: one module per sampling method that changes logits between the token mask and the temperature.

A module bears the name of its field in `SamplingParams`, whose default switches the step off, and has
`make_step(params, vocab_size) -> LogitStep`. It may import Numba: it is imported when a request first needs it.
"""
