"""Does a teacher help? One student, trained with and without one, on the same data, for as long; by hand.

    python tests/bench/distillation.py --train train.jsonl --dev dev.jsonl --teacher checkpoint/ --seconds 300

Both arms start from the same weights and have the same data and settings. Time is CPU time of the whole process, so
that a busy machine favours neither, and asking the teacher counts: the student alone takes more steps in that time.
The teacher is any checkpoint with the built-in model's tokenizer: the built-in model before its export, or a sibling
made by its recipe with `--shape`. Those are trained with label smoothing, hence the temperature of 1.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from edgelm_export.distill.builtin_recipe import BUILTIN_RECIPE
from edgelm_export.distill.data import encode_tasks
from edgelm_export.distill.distill import open_tokenizer
from edgelm_export.distill.score_student import evaluate_student
from edgelm_export.distill.shape import parse_shape
from edgelm_export.distill.snips import read_utterances
from edgelm_export.distill.student import inherit_layers, load_transformers_model, make_student
from edgelm_export.distill.teacher import add_teacher_targets
from edgelm_export.distill.trainer import Trainer

from edgelm.evaluation.tasks import TaskScore

FIGURES = ("exact", "frame", "intent", "slot_f1")


@dataclass(frozen=True)
class Arm:
    """One training run and how its student does on dev; seconds of CPU time."""

    name: str
    seed: int
    steps: int
    teacher_s: float
    total_s: float
    score: TaskScore


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train", type=Path, required=True)
    parser.add_argument("--dev", type=Path, required=True)
    parser.add_argument("--teacher", type=Path, required=True)
    parser.add_argument("--student", default="hidden=192,layers=3,heads=6,kv-heads=2,mlp=512")
    parser.add_argument("--seconds", type=float, default=300, help="CPU time of each arm, the teacher's included")
    parser.add_argument("--seeds", default="0,1")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--kl-weight", type=float, default=0.7)
    parser.add_argument("--temperature", type=float, default=1.0)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    arms = []
    for seed in map(int, args.seeds.split(",")):
        for name in ("with teacher", "alone"):
            arm = run(name, seed, args)
            print(json.dumps(asdict(arm)), file=sys.stderr, flush=True)
            arms.append(arm)
    print(f"{'arm':<14}{'seeds':>6}{'steps':>8}{'asking s':>10}{'all s':>8}" + "".join(f"{f:>9}" for f in FIGURES))
    for name in ("with teacher", "alone"):
        same = [arm for arm in arms if arm.name == name]
        steps, asking, total = (statistics.mean(getattr(a, f) for a in same) for f in ("steps", "teacher_s", "total_s"))
        figures = [statistics.mean(getattr(arm.score, f) for arm in same) for f in FIGURES]
        print(
            f"{name:<14}{len(same):>6}{steps:>8.0f}{asking:>10.0f}{total:>8.0f}"
            + "".join(f"{f:>9.3f}" for f in figures)
        )
    return 0


def run(name: str, seed: int, args: argparse.Namespace) -> Arm:
    """Train one student and score it."""
    tokenizer = open_tokenizer(args.teacher)
    settings = replace(
        BUILTIN_RECIPE.settings, seed=seed, epochs=10_000, kl_weight=args.kl_weight, temperature=args.temperature
    )
    tasks = [utterance.to_task() for utterance in read_utterances(args.train)]
    examples = encode_tasks(tokenizer, tasks, 0, settings.row_length)
    start = time.process_time()
    if name == "with teacher":
        examples = add_teacher_targets(load_transformers_model(args.teacher, "teacher"), examples, settings)
    asking = time.process_time() - start
    student = make_student(parse_shape(args.student), tokenizer.get_vocab_size(), 256, 1, 0, seed)
    if name == "with teacher":
        inherit_layers(student, load_transformers_model(args.teacher, "teacher"))
    limited = replace(settings, max_s=args.seconds - asking)
    trainer = Trainer(student, lambda _: examples, limited, clock=time.process_time)
    trainer.run()
    total = time.process_time() - start
    score = evaluate_student(student, tokenizer, [utterance.to_task() for utterance in read_utterances(args.dev)])
    return Arm(name, seed, trainer.progress.step, asking, total, score)


if __name__ == "__main__":
    sys.exit(main())
