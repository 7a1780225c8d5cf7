"""How a run trains, where it stands, and the learning rate in between. Knows nothing of torch."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from edgelm.errors import ConfigError


@dataclass(frozen=True, slots=True)
class TrainingSettings:
    """How to train.

    Parameters
    ----------
    epochs
        Passes over the data, at least 1.
    batch_tokens, row_length
        Tokens in a batch and in each of its rows.
    lr, warmup, weight_decay, clip
        Peak learning rate, share of the run spent warming up (0 to 1), AdamW's decay, largest gradient norm.
    muon
        Orthogonalize the updates of the layers' matrices: fewer steps to the same loss, each somewhat dearer.
    dropout, smoothing
        0 to 1: of what each attention and MLP adds to the residual; of the labels, over the vocabulary.
    averaging
        Decay of the exponential moving average of the weights, 0 to 1; the average is the result. 0: off.
    kl_weight, temperature
        With a teacher: loss = (1 - kl_weight) * cross-entropy + kl_weight * T^2 KL at temperature T. A teacher that
        was trained with smoothing is best followed at 1: what it spreads over the vocabulary grows with T until it
        outweighs what it knows.
    teacher_top_k
        How many of the teacher's best tokens are kept for each target token, where it is asked once before
        training, as `distill` does for data that stays the same. 0: it is asked at every step, for all tokens.
    seed
        Start of everything random.
    bf16
        Multiply matrices in bfloat16; weights, sums and updates stay fp32.
    max_s
        Stop after this many seconds of training; the learning rate runs down in time. None: no limit.
    save_every_s
        Seconds between checkpoints.
    """

    epochs: int = 10
    batch_tokens: int = 4096
    row_length: int = 128
    lr: float = 2e-3
    warmup: float = 0.05
    weight_decay: float = 0.1
    clip: float = 1.0
    muon: bool = False
    dropout: float = 0.0
    smoothing: float = 0.0
    averaging: float = 0.0
    kl_weight: float = 0.7
    temperature: float = 2.0
    teacher_top_k: int = 32
    seed: int = 0
    bf16: bool = False
    max_s: float | None = None
    save_every_s: float = 60.0

    def __post_init__(self) -> None:
        checks = (
            ("epochs", self.epochs >= 1, "at least 1"),
            ("batch_tokens", self.batch_tokens >= self.row_length >= 2, "at least the row length"),
            ("lr", 0 < self.lr < math.inf, "over 0"),
            ("temperature", 0 < self.temperature < math.inf, "over 0"),
            ("teacher_top_k", self.teacher_top_k >= 0, "at least 0"),
            ("kl_weight", 0 <= self.kl_weight <= 1, "0 to 1"),
            ("warmup", 0 <= self.warmup < 1, "0 to under 1"),
            ("dropout", 0 <= self.dropout < 1, "0 to under 1"),
            ("smoothing", 0 <= self.smoothing < 1, "0 to under 1"),
            ("averaging", 0 <= self.averaging < 1, "0 to under 1"),
            ("max_s", self.max_s is None or self.max_s > 0, "over 0"),
        )
        for name, holds, allowed in checks:
            if not holds:
                raise ConfigError(f"{name.replace('_', '-')} {getattr(self, name)} must be {allowed}")


STEPS_PER_EPOCH: Final = 32
"""So many batches the data are divided into, where that makes none of them smaller or larger than these bounds."""
BATCH_TOKENS_RANGE: Final = (512, 4096)
MIN_STEPS: Final = 1000
"""What a new student needs at least: fewer leave it where it began, however little data there are."""
EPOCHS_RANGE: Final = (10, 60)


def fit_settings(lengths: Sequence[int], given: Mapping[str, Any]) -> TrainingSettings:
    """Return settings for data: what is given, and row length, batch and epochs chosen to suit where they are not.

    lengths: tokens of each example; given: fields of `TrainingSettings`. A row holds the longest example. Raises
    `ConfigError`
    for a value out of range.
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
    """Where a run stands.

    Parameters
    ----------
    share
        Of the run that is done, 0 to 1.
    epoch, step
        Counted from 0 and over the whole run.
    loss
        Mean of the last steps, in nats per target token.
    tokens
        Trained on so far, without padding.
    elapsed_s
        Of training, earlier parts of a resumed run included.
    """

    share: float
    epoch: int
    step: int
    loss: float
    tokens: int
    elapsed_s: float

    @property
    def summary(self) -> str:
        """Epoch, counted from 1, and loss, for a progress bar."""
        return f"epoch {self.epoch + 1}, loss {self.loss:.3f}"


def learning_rate(share: float, settings: TrainingSettings) -> float:
    """Return the rate at `share` of the run: linear warm-up, then a cosine down to 1 % of the peak."""
    if share < settings.warmup:
        return settings.lr * max(share / settings.warmup, 1e-3)
    done = (min(share, 1.0) - settings.warmup) / (1 - settings.warmup)
    return settings.lr * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * done)))
