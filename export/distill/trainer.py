"""The training loop: AdamW, warm-up and cosine schedule, clipping, averaged weights, checkpoints, exact resume.

All randomness comes from the seed, the epoch and torch's generator, whose state is in every checkpoint. So an
interrupted and resumed run ends with the same weights as an uninterrupted one. Knows no files except its checkpoint.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from edgelm.errors import CheckpointError, ConfigError, EdgelmError

from .data import IGNORED_LABEL, Batch, EncodedExample, make_batches
from .losses import cross_entropy, forward_kl, forward_kl_top_k
from .settings import TrainingProgress, TrainingSettings, learning_rate

Dataset = Callable[[int], Sequence[EncodedExample]]
"""Returns the examples of an epoch; the same for the same epoch number."""


def attention_mask(segments: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the mask added to attention scores: 0 for earlier positions of the same example, else very low.

    Parameters
    ----------
    segments
        int64 [rows, length].

    Returns
    -------
    Tensor
        [rows, 1, length, length] of `dtype`. Padding attends to padding, so that no row of scores is empty.
    """
    length = segments.shape[1]
    same = segments[:, :, None] == segments[:, None, :]
    seen = same & torch.ones(length, length, dtype=torch.bool, device=segments.device).tril()
    mask = torch.zeros(seen.shape, dtype=dtype, device=segments.device)
    return mask.masked_fill_(~seen, torch.finfo(dtype).min)[:, None]


def target_logits(model: Any, batch: Batch, device: str) -> tuple[Tensor, Tensor]:
    """Run a packed batch; return logits [n, vocabulary] and labels [n] of its target positions."""
    tokens, labels, positions, segments = (
        torch.from_numpy(array).to(device) for array in (batch.tokens, batch.labels, batch.positions, batch.segments)
    )
    hidden = model.base_model(
        input_ids=tokens,
        attention_mask=attention_mask(segments, torch.float32),
        position_ids=positions,
        use_cache=False,
    ).last_hidden_state
    learned = labels != IGNORED_LABEL
    return model.get_output_embeddings()(hidden[learned]), labels[learned]


def make_optimizers(model: nn.Module, settings: TrainingSettings) -> list[torch.optim.Optimizer]:
    """Return AdamW for all weights, or Muon (Jordan et al. 2024) for the layers' matrices and AdamW for the rest.

    Muon's step is scaled as in Liu et al. 2025, "Muon is Scalable for LLM Training", section 2.2, so that both use the
    same learning rate and decay.
    """
    weights = dict(model.named_parameters())
    inner = {name for name, weight in weights.items() if settings.muon and weight.ndim == 2 and ".layers." in name}
    groups: list[dict[str, Any]] = [
        {"params": [weight for name, weight in weights.items() if weight.ndim >= 2 and name not in inner]},
        {"params": [weight for weight in weights.values() if weight.ndim < 2], "weight_decay": 0.0},
    ]
    decay = settings.weight_decay
    optimizers: list[torch.optim.Optimizer] = [
        torch.optim.AdamW(groups, lr=settings.lr, betas=(0.9, 0.98), weight_decay=decay, fused=True)
    ]
    if inner:
        matrices = [weights[name] for name in sorted(inner)]
        optimizers.append(
            torch.optim.Muon(matrices, lr=settings.lr, weight_decay=decay, adjust_lr_fn="match_rms_adamw")
        )
    return optimizers


class Trainer:
    """One training run: model, optimizers, averaged weights and position. `run` trains from the position to the end.

    Parameters
    ----------
    model
        A transformers causal language model in fp32; trained in place.
    dataset
        See `Dataset`.
    settings
        See `TrainingSettings`.
    teacher
        A model with the same vocabulary that is run at every step; None without a teacher, or if the examples hold its
        targets.
    checkpoint
        The file that `run` saves to and `resume` reads; None: no checkpoint.
    device
        Such as "cpu" or "cuda".
    identity
        Identifies data and settings; a checkpoint with another identity is refused.
    clock
        Returns seconds.
    """

    def __init__(
        self,
        model: Any,
        dataset: Dataset,
        settings: TrainingSettings,
        *,
        teacher: Any = None,
        checkpoint: Path | None = None,
        device: str = "cpu",
        identity: str = "",
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.model = model.to(device)
        self.teacher = teacher.to(device).eval() if teacher is not None else None
        self.settings = settings
        self.progress = TrainingProgress(0.0, 0, 0, math.nan, 0, 0.0)
        self._dataset = dataset
        self._checkpoint = checkpoint
        self._device = device
        self._identity = identity
        self._clock = clock
        self._batch_of_epoch = 0
        self._optimizers = make_optimizers(model, settings)
        self._average = [weight.detach().clone() for weight in model.parameters()] if settings.averaging else []
        torch.manual_seed(settings.seed)

    def run(self, report: Callable[[TrainingProgress], None] = lambda _: None) -> None:
        """Train to the end. The model then has the final weights, the averaged ones if averaging is on."""
        settings, start = self.settings, self._clock() - self.progress.elapsed_s
        saved = self._clock()
        self.model.train()
        with _residual_dropout(self.model, settings.dropout):
            for epoch, batch, share in self._batches():
                share = max(share, self.progress.elapsed_s / settings.max_s if settings.max_s else 0.0)
                loss = self._step(batch, share)
                elapsed = self._clock() - start
                last = self.progress
                self.progress = TrainingProgress(
                    share,
                    epoch,
                    last.step + 1,
                    loss if math.isnan(last.loss) else 0.98 * last.loss + 0.02 * loss,
                    last.tokens + int((batch.segments >= 0).sum()),
                    elapsed,
                )
                report(self.progress)
                if settings.max_s and elapsed >= settings.max_s:
                    break
                if self._checkpoint and self._clock() - saved >= settings.save_every_s:
                    self.save()
                    saved = self._clock()
        self.model.eval()
        if self._average:
            with torch.no_grad():
                for weight, average in zip(self.model.parameters(), self._average, strict=True):
                    weight.copy_(average)

    def _batches(self) -> Iterator[tuple[int, Batch, float]]:
        """Yield (epoch, batch, fraction of the run) from the current position."""
        settings = self.settings
        rows = max(1, settings.batch_tokens // settings.row_length)
        for epoch in range(self.progress.epoch, settings.epochs):
            rng = np.random.default_rng([settings.seed, epoch])
            batches = make_batches(self._dataset(epoch), settings.row_length, rows, rng)
            for at in range(self._batch_of_epoch, len(batches)):
                self._batch_of_epoch = at + 1
                yield epoch, batches[at], (epoch + at / len(batches)) / settings.epochs
            self._batch_of_epoch = 0

    def _step(self, batch: Batch, share: float) -> float:
        settings = self.settings
        for optimizer in self._optimizers:
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(share, settings)
        loss = self._loss(batch)
        if not math.isfinite(loss.item()):
            raise ConfigError(f"the loss became {loss.item()} at step {self.progress.step}: lower the learning rate")
        self.model.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(self.model.parameters(), settings.max_grad_norm)
        for optimizer in self._optimizers:
            optimizer.step()
        if self._average:
            # A smaller decay in early steps, so that the average forgets the random initial weights.
            decay = min(settings.averaging, (1 + self.progress.step) / (10 + self.progress.step))
            torch._foreach_lerp_(self._average, [w.detach() for w in self.model.parameters()], 1 - decay)
        return loss.item()

    def _loss(self, batch: Batch) -> Tensor:
        settings = self.settings
        with torch.autocast(self._device.split(":")[0], torch.bfloat16, enabled=settings.bf16):
            logits, labels = target_logits(self.model, batch, self._device)
            if self.teacher is not None:
                with torch.no_grad():
                    wanted, _ = target_logits(self.teacher, batch, self._device)
        loss = cross_entropy(logits, labels, settings.smoothing)
        if self.teacher is not None:
            kl = forward_kl(logits, wanted, settings.temperature)
        elif batch.teacher_targets is not None:
            log_probs = torch.from_numpy(batch.teacher_targets.log_probs).to(self._device)
            tokens = torch.from_numpy(batch.teacher_targets.tokens).to(self._device, torch.int64)
            kl = forward_kl_top_k(logits, log_probs, tokens, settings.temperature)
        else:
            return loss
        return (1 - settings.kl_weight) * loss + settings.kl_weight * kl

    def save(self) -> None:
        """Write the checkpoint. The earlier one is replaced only when the new one is complete.

        Raises
        ------
        EdgelmError
            The file cannot be written.
        """
        if self._checkpoint is None:
            return
        state = {
            "identity": self._identity,
            "model": self.model.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self._optimizers],
            "average": self._average,
            "torch_rng": torch.get_rng_state(),
            "progress": [getattr(self.progress, name) for name in TrainingProgress.__slots__],
            "batch_of_epoch": self._batch_of_epoch,
        }
        partial = self._checkpoint.with_suffix(".tmp")
        try:
            torch.save(state, partial)
            partial.replace(self._checkpoint)
        except (OSError, RuntimeError) as error:  # torch raises RuntimeError for a full disk
            raise EdgelmError(f"{self._checkpoint} cannot be written: {error}") from error

    def resume(self) -> None:
        """Continue from the checkpoint.

        Raises
        ------
        CheckpointError
            It cannot be read, or was made with other data, shapes or settings.
        """
        if self._checkpoint is None:
            raise CheckpointError("this run has no checkpoint to resume from")
        try:
            state = torch.load(self._checkpoint, map_location=self._device, weights_only=True)
        except Exception as error:  # torch raises many types for a damaged file
            raise CheckpointError(f"cannot resume from {self._checkpoint}: {error}") from error
        if state["identity"] != self._identity:
            raise CheckpointError(
                f"{self._checkpoint} is from another run (other data, shapes or settings): "
                "restart with --force, or use the options of that run"
            )
        self.model.load_state_dict(state["model"])
        for optimizer, saved in zip(self._optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        self._average = state["average"]
        torch.set_rng_state(state["torch_rng"].cpu())
        self.progress = TrainingProgress(*state["progress"])
        self._batch_of_epoch = state["batch_of_epoch"]


@contextmanager
def _residual_dropout(model: nn.Module, rate: float) -> Iterator[None]:
    """Apply dropout to the output of each attention and MLP; Llama has no dropout there itself."""

    def drop(_module: nn.Module, _inputs: object, output: Tensor) -> Tensor:
        return functional.dropout(output, rate)

    hooks = [
        module.register_forward_hook(drop)
        for name, module in model.named_modules()
        if rate and name.endswith(("o_proj", "down_proj"))
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
