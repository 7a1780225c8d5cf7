"""A teacher that is run once: its targets for each token are stored with the examples.

The teacher is larger than the student, so running it in every epoch would cost more than the training itself.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from .data import EncodedExample, TeacherTargets, collate, pack_rows
from .settings import TrainingSettings
from .trainer import target_logits


@torch.no_grad()
def add_teacher_targets(
    teacher: Any,
    examples: Sequence[EncodedExample],
    settings: TrainingSettings,
    device: str = "cpu",
    report: Callable[[int, int], None] = lambda _done, _of: None,
) -> list[EncodedExample]:
    """Return the examples with the teacher's `settings.teacher_top_k` best tokens for each target token.

    Parameters
    ----------
    teacher
        A transformers causal language model with the examples' vocabulary.
    report
        Called with (rows done, rows in total).
    """
    teacher = teacher.to(device).eval()
    asked = list(examples)
    rows = pack_rows([len(example.tokens) for example in examples], settings.row_length)
    per_batch = max(1, settings.batch_tokens // settings.row_length)
    for start in range(0, len(rows), per_batch):
        chosen = rows[start : start + per_batch]
        batch = collate([[examples[index] for index in row] for row in chosen], settings.row_length)
        with torch.autocast(device.split(":")[0], torch.bfloat16, enabled=settings.bf16):
            logits, _ = target_logits(teacher, batch, device)
        best = torch.log_softmax(logits.float() / settings.temperature, -1)
        log_probs, tokens = best.topk(min(settings.teacher_top_k, best.shape[-1]), -1)
        order = [index for row in chosen for index in row]
        counts = [len(examples[index].tokens) - examples[index].target_start for index in order]
        ends = np.cumsum(counts)[:-1]
        values, names = np.split(log_probs.cpu().numpy(), ends), np.split(tokens.to(torch.int32).cpu().numpy(), ends)
        for at, index in enumerate(order):
            asked[index] = replace(asked[index], teacher_targets=TeacherTargets(values[at].copy(), names[at].copy()))
        report(min(start + per_batch, len(rows)), len(rows))
    return asked
