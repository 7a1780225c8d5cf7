"""Settings of a training run, its progress, and the learning rate schedule. Does not import torch."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Final

from edgelm.errors import ConfigError
from edgelm.validation import FieldError, Range, check

MAX_COUNT: Final = 1 << 40
"""Epochs, tokens, classes."""
_POSITIVE: Final = Range(0, math.inf, open_low=True, open_high=True)
_SHARE: Final = Range(0, 1, open_high=True)


@dataclass(frozen=True, slots=True)
class TrainingSettings:
    """Settings of a training run.

    Parameters
    ----------
    epochs
        Passes over the data, at least 1.
    batch_tokens, row_length
        Tokens in a batch and in each of its rows.
    lr, warmup, weight_decay, max_grad_norm
        Peak learning rate, fraction of the run for warm-up (0 to 1), AdamW's decay, largest gradient norm.
    muon
        Orthogonalize the updates of the layers' matrices: fewer but slower steps to the same loss.
    dropout, smoothing
        0 to 1: dropout on the output of each attention and MLP; label smoothing over the vocabulary.
    averaging
        Decay of the exponential moving average of the weights, 0 to 1; the average is the result. 0: off.
    kl_weight, temperature
        With a teacher: loss = (1 - kl_weight) * cross-entropy + kl_weight * T^2 KL at temperature T. Use T = 1 for a
        teacher trained with label smoothing: the probability that it spreads over the vocabulary grows with T until it
        dominates.
    teacher_top_k
        Number of the teacher's best tokens stored for each target token, if it is run once before training, as
        `distill` does for data that does not change. 0: the teacher is run at every step, for all tokens.
    seed
        Seed of all randomness.
    bf16
        Multiply matrices in bfloat16; weights, sums and updates stay fp32.
    max_s
        Stop after this many seconds of training; the learning rate follows the time. None: no limit.
    save_every_s
        Seconds between checkpoints.
    """

    epochs: Annotated[int, Range(1, MAX_COUNT)] = 10
    batch_tokens: Annotated[int, Range(2, MAX_COUNT)] = 4096
    row_length: Annotated[int, Range(2, MAX_COUNT)] = 128
    lr: Annotated[float, _POSITIVE] = 2e-3
    warmup: Annotated[float, _SHARE] = 0.05
    weight_decay: float = 0.1
    max_grad_norm: float = 1.0
    muon: bool = False
    dropout: Annotated[float, _SHARE] = 0.0
    smoothing: Annotated[float, _SHARE] = 0.0
    averaging: Annotated[float, _SHARE] = 0.0
    kl_weight: Annotated[float, Range(0, 1)] = 0.7
    temperature: Annotated[float, _POSITIVE] = 2.0
    teacher_top_k: Annotated[int, Range(0, MAX_COUNT)] = 32
    seed: int = 0
    bf16: bool = False
    max_s: Annotated[float, Range(0, math.inf, open_low=True)] | None = None
    save_every_s: float = 60.0

    def __post_init__(self) -> None:
        try:
            check(self)
        except FieldError as error:
            raise ConfigError(str(error).replace("_", "-")) from error
        if self.batch_tokens < self.row_length:
            raise ConfigError(f"batch-tokens must be at least row-length, {self.row_length}, got {self.batch_tokens}")


STEPS_PER_EPOCH: Final = 32
"""Batches per epoch, if the batches then have a size within `BATCH_TOKENS_RANGE`."""
BATCH_TOKENS_RANGE: Final = (512, 4096)
MIN_STEPS: Final = 1000
"""Minimum steps of a new student; with fewer it stays close to its initial weights, for any amount of data."""
EPOCHS_RANGE: Final = (10, 60)


def fit_settings(lengths: Sequence[int], given: Mapping[str, Any]) -> TrainingSettings:
    """Return settings: the given ones, and row length, batch size and epochs chosen for the data if not given.

    lengths: tokens of each example. given: fields of `TrainingSettings`. A row holds the longest example. Raises
    `ConfigError` for a value out of range.
    """
    longest, total = max(lengths), sum(lengths)
    row_length = given.get("row_length") or -(-longest // 16) * 16
    least, most = (max(bound, row_length) for bound in BATCH_TOKENS_RANGE)
    batch = given.get("batch_tokens")
    if batch is None:
        wanted = max(total // STEPS_PER_EPOCH, 1)
        batch = min(max(1 << (wanted.bit_length() - 1), least), most)
    steps = max(1, total // max(batch, 1))
    epochs = given.get("epochs") or min(max(-(-MIN_STEPS // steps), EPOCHS_RANGE[0]), EPOCHS_RANGE[1])
    return TrainingSettings(**{**given, "row_length": row_length, "batch_tokens": batch, "epochs": epochs})


@dataclass(frozen=True, slots=True)
class TrainingProgress:
    """The progress of a run.

    Parameters
    ----------
    fraction_done
        0 to 1.
    epoch, step
        From 0; `step` counts over the whole run.
    loss
        Moving average over recent steps, in nats per target token.
    tokens
        Tokens trained on so far, without padding.
    elapsed_s
        Seconds of training, with earlier parts of a resumed run.
    """

    fraction_done: float
    epoch: int
    step: int
    loss: float
    tokens: int
    elapsed_s: float

    @property
    def summary(self) -> str:
        """Epoch, from 1, and loss, for a progress bar."""
        return f"epoch {self.epoch + 1}, loss {self.loss:.3f}"


def learning_rate(fraction_done: float, settings: TrainingSettings) -> float:
    """Return the learning rate: linear warm-up, then a cosine down to 1 % of the peak."""
    if fraction_done < settings.warmup:
        return settings.lr * max(fraction_done / settings.warmup, 1e-3)
    done = (min(fraction_done, 1.0) - settings.warmup) / (1 - settings.warmup)
    return settings.lr * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * done)))
