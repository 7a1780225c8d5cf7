"""Does a teacher help? One student, trained with and without one, on the same data, for as long; by hand.

    python tests/bench/distillation.py --train train.jsonl --dev dev.jsonl --teacher checkpoint/ --seconds 240

Both arms start from the same weights, see the same batches in the same order and have the same settings. The time is
CPU time of the whole process, so that a busy machine favours neither, and the teacher's own forward passes count as
the student's time. A third arm, without the teacher, takes as many steps as the distilled one.
The teacher is any checkpoint with the tokenizer of the built-in model: its larger sibling comes from
`python -m edgelm_export.distill.builtin --shape hidden=256,layers=8,heads=8,kv-heads=2,mlp=704`.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from edgelm_export.distill.builtin import BUILTIN, make_dataset
from edgelm_export.distill.evaluate import evaluate
from edgelm_export.distill.pipeline import Start, open_tokenizer
from edgelm_export.distill.settings import Settings
from edgelm_export.distill.shape import parse_shape
from edgelm_export.distill.snips import read_utterances
from edgelm_export.distill.student import make_student, open_model
from edgelm_export.distill.trainer import Trainer

from edgelm.tasks import TaskScore


@dataclass(frozen=True)
class Arm:
    """One training run and how its student does on dev."""

    name: str
    seed: int
    steps: int
    seconds: float
    score: TaskScore


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train", type=Path, required=True)
    parser.add_argument("--dev", type=Path, required=True)
    parser.add_argument("--teacher", type=Path, required=True)
    parser.add_argument("--student", default="hidden=96,layers=3,heads=3,kv-heads=1,mlp=256")
    parser.add_argument("--seconds", type=float, default=240, help="CPU seconds of training for each arm")
    parser.add_argument("--seeds", default="0,1")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--kl-weight", type=float, default=0.9)
    parser.add_argument("--temperature", type=float, default=2.0)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    arms: list[Arm] = []
    for seed in map(int, args.seeds.split(",")):
        settings = replace(
            BUILTIN.settings,
            epochs=1000,
            seed=seed,
            max_s=args.seconds,
            kl_weight=args.kl_weight,
            temperature=args.temperature,
        )
        arms.append(run("with teacher", args, settings))
        arms.append(run("alone, as long", args, settings))
    print(f"\n{'arm':<16}{'seeds':>6}{'steps':>8}{'seconds':>9}{'exact':>8}{'frame':>8}{'intent':>8}{'slot F1':>9}")
    for name in dict.fromkeys(arm.name for arm in arms):
        same = [arm for arm in arms if arm.name == name]
        means = [
            statistics.mean(getattr(arm.score, key) for arm in same) for key in ("exact", "frame", "intent", "slot_f1")
        ]
        print(
            f"{name:<16}{len(same):>6}{statistics.mean(arm.steps for arm in same):>8.0f}"
            f"{statistics.mean(arm.seconds for arm in same):>9.0f}"
            + "".join(f"{mean:>{width}.3f}" for mean, width in zip(means, (8, 8, 8, 9), strict=True))
        )
    return 0


def run(name: str, args: argparse.Namespace, settings: Settings) -> Arm:
    """Train one student and score it."""
    utterances = read_utterances(args.train)
    tokenizer = open_tokenizer(args.teacher)
    shape = parse_shape(args.student)
    student = make_student(shape, tokenizer.get_vocab_size(), 256, 1, 0, settings.seed)
    start = Start(student, tokenizer, [0], lambda _: None)
    teacher = open_model(args.teacher, "teacher") if name == "with teacher" else None
    dataset = make_dataset(utterances, start, replace(BUILTIN, settings=settings))
    trainer = Trainer(student, dataset, settings, teacher=teacher, clock=time.process_time)
    trainer.run()
    score = evaluate(student, tokenizer, [utterance.to_task() for utterance in read_utterances(args.dev)])
    arm = Arm(name, settings.seed, trainer.progress.step, trainer.progress.elapsed_s, score)
    print(json.dumps({"arm": name, "seed": arm.seed, "steps": arm.steps, **score.to_dict()}), file=sys.stderr)
    return arm


if __name__ == "__main__":
    sys.exit(main())
