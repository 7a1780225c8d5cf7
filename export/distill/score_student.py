"""Scores a student during training: greedy answers of a transformers model to many prompts, in batches."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from tokenizers import Tokenizer

from edgelm.evaluation.tasks import Task, TaskScore, score_tasks


@torch.inference_mode()
def answer_greedily(
    model: Any, tokenizer: Tokenizer, prompts: Sequence[str], *, max_tokens: int = 128, batch: int = 100
) -> list[str]:
    """Return the answer to each prompt, up to the end token or `max_tokens`."""
    encoded = [encoding.ids for encoding in tokenizer.encode_batch(list(prompts))]
    order = sorted(range(len(encoded)), key=lambda index: len(encoded[index]))
    answers = [""] * len(encoded)
    for start in range(0, len(order), batch):
        chosen = order[start : start + batch]
        width = max(len(encoded[index]) for index in chosen)
        pad = model.generation_config.pad_token_id or 0
        rows = [[pad] * (width - len(encoded[i])) + encoded[i] for i in chosen]  # padded on the left
        mask = [[0] * (width - len(encoded[i])) + [1] * len(encoded[i]) for i in chosen]
        made = model.generate(
            input_ids=torch.tensor(rows, device=model.device),
            attention_mask=torch.tensor(mask, device=model.device),
            max_new_tokens=max_tokens,
            do_sample=False,
        )
        for index, tokens in zip(chosen, made[:, width:].tolist(), strict=True):
            answers[index] = tokenizer.decode(tokens, skip_special_tokens=True)
    return answers


def evaluate_student(model: Any, tokenizer: Tokenizer, tasks: Sequence[Task]) -> TaskScore:
    """Answer every task greedily and score the answers."""
    return score_tasks(tasks, answer_greedily(model, tokenizer, [task.prompt for task in tasks]))
