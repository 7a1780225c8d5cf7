"""The recipe of the built-in model: spoken commands to JSON, trained on the SNIPS data only.

python -m edgelm_export.distill.builtin_recipe --data train.jsonl --out checkpoint/
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Final

import numpy as np
import torch

from edgelm.errors import EdgelmError
from edgelm.system.progress_bar import ProgressBar

from .augment import AugmentationRates, Augmenter
from .data import EncodedExample, encode_tasks
from .distill import InitialStudent, hash_parts, prepare_target, train_into
from .score_student import evaluate_student
from .settings import TrainingProgress, TrainingSettings
from .shape import StudentShape, parse_shape
from .snips import Utterance, answer_pieces, read_utterances
from .student import make_student
from .student_tokenizer import BOS, EOS, save_tokenizer, train_tokenizer
from .trainer import Dataset

CONTEXT_TOKENS: Final = 256
"""Positions of the model; the longest training example has 213 tokens."""


@dataclass(frozen=True, slots=True)
class Recipe:
    """All settings that, with the data, determine the result."""

    shape: StudentShape
    settings: TrainingSettings
    vocab_size: int = 2048
    noise: AugmentationRates = field(default_factory=AugmentationRates)


SHAPE: Final = "hidden=192,layers=6,heads=6,kv-heads=2,mlp=512"

BUILTIN_RECIPE: Final = Recipe(
    parse_shape(SHAPE),
    TrainingSettings(
        epochs=16,
        batch_tokens=2048,
        row_length=192,
        lr=2e-3,
        muon=True,
        smoothing=0.05,
        averaging=0.998,
        bf16=True,
    ),
)
"""The recipe of the built-in bundle."""


def make_initial_student(utterances: Sequence[Utterance], recipe: Recipe) -> InitialStudent:
    """Return the untrained model and its tokenizer."""
    texts = [text for u in utterances for text in (u.text, u.text.lower(), *(value for _, value in u.slots))]
    tokenizer = train_tokenizer(texts, recipe.vocab_size, answer_pieces(utterances), spaces_apart=True)
    bos, eos = tokenizer.token_to_id(BOS), tokenizer.token_to_id(EOS)
    model = make_student(recipe.shape, tokenizer.get_vocab_size(), CONTEXT_TOKENS, bos, eos, recipe.settings.seed)
    return InitialStudent(model, tokenizer, [eos], lambda to: save_tokenizer(tokenizer, to, CONTEXT_TOKENS))


def make_dataset(utterances: Sequence[Utterance], start: InitialStudent, recipe: Recipe) -> Dataset:
    """Return the examples of each epoch, augmented anew; those longer than a row are left out."""
    augment = Augmenter(utterances, recipe.noise)
    row_length = recipe.settings.row_length

    def examples(epoch: int) -> list[EncodedExample]:
        rng = np.random.default_rng([recipe.settings.seed, epoch, 1])
        tasks = [augment(utterance, rng).to_task() for utterance in utterances]
        encoded = encode_tasks(start.tokenizer, tasks, start.eos_ids[0], 4 * CONTEXT_TOKENS)
        return [example for example in encoded if len(example.tokens) <= row_length]

    return examples


def train_builtin(
    data: Path,
    out: Path,
    recipe: Recipe,
    *,
    resume: bool = False,
    force: bool = False,
    report: Callable[[TrainingProgress], None] = lambda _: None,
) -> tuple[InitialStudent, TrainingProgress]:
    """Train by `recipe` on SNIPS utterances in `data`; write the checkpoint directory `out`."""
    prepare_target(out, resume=resume, force=force)
    utterances = read_utterances(data)
    start = make_initial_student(utterances, recipe)
    progress = train_into(
        out,
        start,
        make_dataset(utterances, start, recipe),
        recipe.settings,
        identity=hash_parts(data.read_bytes(), json.dumps(asdict(recipe), sort_keys=True)),
        resume=resume,
        report=report,
    )
    return start, progress


def main(argv: Sequence[str] | None = None) -> int:
    """Run the recipe from the command line; print a JSON object with the figures."""
    parser = argparse.ArgumentParser(prog="python -m edgelm_export.distill.builtin_recipe", description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="train.jsonl of the SNIPS data")
    parser.add_argument("--dev", type=Path, help="dev.jsonl, to score the result; not used for training")
    parser.add_argument("--out", type=Path, required=True, help="checkpoint directory to create")
    parser.add_argument("--shape", default=SHAPE, help="(%(default)s)")
    parser.add_argument("--epochs", type=int, default=BUILTIN_RECIPE.settings.epochs, help="(%(default)s)")
    parser.add_argument("--seed", type=int, default=BUILTIN_RECIPE.settings.seed, help="(%(default)s)")
    parser.add_argument("--threads", type=int, help="processor threads (all cores)")
    parser.add_argument("--resume", action="store_true", help="continue an interrupted run")
    parser.add_argument("--force", action="store_true", help="replace OUT")
    args = parser.parse_args(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    try:
        recipe = Recipe(parse_shape(args.shape), replace(BUILTIN_RECIPE.settings, epochs=args.epochs, seed=args.seed))
        with ProgressBar() as bar:
            start, progress = train_builtin(
                args.data,
                args.out,
                recipe,
                resume=args.resume,
                force=args.force,
                report=lambda state: bar(state.summary, round(100 * state.fraction_done), 100),
            )
        result: dict[str, object] = {"steps": progress.step, "loss": progress.loss, "elapsed_s": progress.elapsed_s}
        if args.dev:
            tasks = [utterance.to_task() for utterance in read_utterances(args.dev)]
            result["dev"] = evaluate_student(start.model, start.tokenizer, tasks).to_dict()
    except EdgelmError as error:
        sys.stderr.write(f"{error}\n")
        return 1
    sys.stdout.write(json.dumps(result) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
