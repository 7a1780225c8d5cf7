"""edgelm beside what users would pick instead, on checkpoints of real shapes: `python -m tests.bench.peers`; by hand.

Checkpoints with random weights, each peer in its own best form: llama.cpp's Q4_0, Q4_K_M and Q8_0, onnxruntime-genai's
int4, optimum, transformers with torch. Every measurement is a process of its own, all sides in turn, so that a noisy
machine troubles all alike: what counts is the median of the ratios of one round. How far each form is from the
checkpoint (KL) stands beside its figures. Run it on a quiet machine; it needs the extras cpu, export, distill, optimum
and report. Exit code 1 says that a target was missed.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tests.bench.peers.building import REPO, Builder, Failed, make_venv
from tests.bench.peers.chart import draw
from tests.bench.peers.closeness import Closeness
from tests.bench.peers.results import verdicts
from tests.bench.peers.shapes import CONFIGS, NAMES, STORIES, write_checkpoint
from tests.bench.peers.sides import EDGELM, PEERS, Side, all_sides
from tests.bench.peers.tables import markdown
from tests.bench.peers.turns import MEASURES, Settings, Turns, job_of

QUICK = {
    "sides": "edgelm-int4,llama-q4_0,genai,genai-threads",
    "measures": "context-256,memory",
    "shapes": "135m",
    "rounds": 1,
    "repeat": 1,
}


def pairs(values: list[str], option: str) -> dict[str, str]:
    """Return NAME=VALUE options as a dictionary."""
    for value in values:
        if "=" not in value:
            sys.exit(f"{option} wants NAME=VALUE, got {value!r}")
    return dict(value.split("=", 1) for value in values)


def chosen(text: str, allowed: Any, option: str) -> list[str]:
    """Return a comma-separated choice; exit with what is allowed where a name is not."""
    names = text.split(",")
    for name in names:
        if name not in allowed:
            sys.exit(f"{option}: unknown {name!r}; allowed: {', '.join(allowed)}")
    return names


def machine() -> str:
    """Name the processor."""
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    model = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), os.uname().machine)
    return f"{model}, {os.cpu_count()} cores"


def find_checkpoint(name: str, given: dict[str, str], folder: Path) -> Path:
    """Return a shape's checkpoint; write it where it is missing."""
    if name in given:
        return Path(given[name]).resolve()
    if name == STORIES:
        path = Path(os.environ.get("EDGELM_SHARED", REPO.parent / "shared")) / "models/stories260K"
        if not path.exists():
            sys.exit(
                f"{path} is missing: set EDGELM_SHARED, give --checkpoint {STORIES}=DIR, or leave it out of --shapes"
            )
        return path
    path = folder / "checkpoint"
    if not path.exists():
        print(f"making the checkpoint of {NAMES[name]}", file=sys.stderr)
        part = folder / "part-checkpoint"
        # In a process of its own: what starts later would inherit this one's peak.
        writer = multiprocessing.get_context("spawn").Process(target=write_checkpoint, args=(part, CONFIGS[name]))
        writer.start()
        writer.join()
        if writer.exitcode:
            sys.exit(f"the checkpoint of {NAMES[name]} could not be written")
        part.rename(path)
    return path


class Comparison:
    """One run's options, sides and report."""

    def __init__(self, args: argparse.Namespace, work: Path) -> None:
        self.args, self.work = args, work
        self.sides = all_sides(EDGELM | pairs(args.edgelm, "--edgelm"))
        self.asked = chosen(args.sides, self.sides, "--sides") if args.sides else list(self.sides)
        self.measures = chosen(args.measures, MEASURES, "--measures")
        self.shapes = chosen(args.shapes, NAMES, "--shapes")
        self.checkpoints, self.bundles = pairs(args.checkpoint, "--checkpoint"), pairs(args.bundle, "--bundle")
        self.report: dict[str, Any] = {"shapes": {}}
        if args.report and args.report.exists():
            self.report = json.loads(args.report.read_text(encoding="utf-8"))
        self.pythons = {each.program: sys.executable for each in self.sides.values()}
        for program, given in (("genai", args.genai_python), ("llama_cpp", args.llama_python)):
            if any(self.sides[name].program == program for name in self.asked):
                self.pythons[program] = given or make_venv(work / f"venv-{program}", program)

    def save(self) -> None:
        """Write every figure so far, so that a run that breaks off has them too."""
        if self.args.report:
            part = self.args.report.with_suffix(".part")
            part.write_text(json.dumps(self.report, indent=1) + "\n", encoding="utf-8")
            part.replace(self.args.report)

    def measure_shape(self, name: str) -> None:
        """Build, judge and measure every side of a shape; an earlier report's entry of it is replaced."""
        args = self.args
        folder = self.work / name
        folder.mkdir(parents=True, exist_ok=True)
        checkpoint = find_checkpoint(name, self.checkpoints, folder)
        builder = Builder(self.work, folder, checkpoint, self.pythons, args.threads)
        sides = {each: self.sides[each] for each in self.asked if args.sides or name in self.sides[each].shapes}
        settings = Settings(args.threads, args.new_tokens, args.repeat)
        failed: dict[str, dict[str, str]] = {}
        entry: dict[str, Any] = {
            "machine": machine(),
            "settings": asdict(settings),
            "parameters": builder.facts.parameters,
            "context": builder.facts.context,
            "ours": [each for each in self.asked if self.sides[each].program == "edgelm"],
            "notes": {each: self.sides[each].note for each in self.asked},
            "left_out": {each: self.sides[each].left_out for each in self.asked if each not in sides},
            "no_reuse": [each.name for each in sides.values() if each.slow],
            "too_long": [],
            "failed": failed,
            "built": {},
            "closeness": {},
            "judged_tokens": 0,
            "versions": {},
            "rounds": [],
        }
        self.report["shapes"][name] = entry
        for side in sides.values():
            given = self.bundles.get(f"{name}:{side.name}")
            try:
                entry["built"][side.name] = builder.build(side, Path(given).resolve() if given else None)
            except Failed as failure:
                print(f"{side.name}: {failure}", file=sys.stderr)
                failed[side.name] = {"build": str(failure)}
        sides = {each: side for each, side in sides.items() if each in entry["built"]}
        self._judge(entry, sides, checkpoint, folder, args.text if name == STORIES else None)
        turns = Turns(
            builder.facts,
            settings,
            sides,
            {each: entry["built"][each]["path"] for each in sides},
            {each: entry["built"][each]["read_mb"] for each in sides},
            self.pythons,
            self.measures,
            self.work,
            failed,
            entry["versions"],
        )
        fitting = Side("", "", "")
        entry["too_long"] = [
            each for each in self.measures if job_of(each, fitting, "", builder.facts, settings, 0) is None
        ]
        turns.warm_up()
        for number in range(1, args.rounds + 1):
            print(f"{name}: round {number} of {args.rounds}", file=sys.stderr, flush=True)
            entry["rounds"].append(turns.round(number))
            self.save()

    def _judge(
        self, entry: dict[str, Any], sides: dict[str, Side], checkpoint: Path, folder: Path, text: Path | None
    ) -> None:
        """Find every form's KL, of forms that sides share only once."""
        if not self.args.kl_tokens:
            return
        print("judging how close each form is", file=sys.stderr, flush=True)
        judge = Closeness(checkpoint, text, self.args.kl_tokens, folder, self.args.threads, self.work)
        entry["judged_tokens"] = len(judge.corpus.scored()[0])
        found: dict[str, Any] = {}
        for side in sides.values():
            path = entry["built"][side.name]["path"]
            form = f"{path} {side.job.get('dtype')}"
            try:
                if form not in found:
                    found[form] = judge.of(self.pythons[side.program], side, path)
                entry["closeness"][side.name] = found[form]
            except Failed as failure:
                print(f"{side.name}, KL: {failure}", file=sys.stderr)
                entry["failed"].setdefault(side.name, {})["KL"] = str(failure)
        self.save()


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.bench.peers",
        description=__doc__,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--shapes", default=",".join(NAMES), help=f"of {', '.join(NAMES)}")
    add("--sides", help=f"of {', '.join([*EDGELM, *(each.name for each in PEERS)])}, and those of --edgelm")
    add("--measures", default=",".join(MEASURES), help=f"of {', '.join(MEASURES)}")
    add("--rounds", type=int, default=5)
    add("--repeat", type=int, default=2, help="repeats within a process, whose median counts; slow sides have one")
    add("--new-tokens", type=int, default=64, help="of an answer; slow sides have 16")
    add("--threads", type=int, default=2)
    add("--kl-tokens", type=int, default=1024, help="tokens on which forms are judged; 0 leaves it out")
    add("--text", type=Path, metavar="FILE", help="judge stories260K on this text, not on what it makes up")
    add("--quick", action="store_true", help="one round of a few sides, measures and shapes")
    add("--edgelm", action="append", default=[], metavar="NAME=FLAGS", help="one more edgelm side, by export flags")
    add("--bundle", action="append", default=[], metavar="SHAPE:SIDE=PATH", help="a form that is built already")
    add("--checkpoint", action="append", default=[], metavar="SHAPE=DIR", help="a checkpoint that is there already")
    add("--judge", metavar="SIDE", help="which of edgelm's sides the targets are judged with")
    add("--genai-python", metavar="PYTHON", help="an interpreter with onnxruntime-genai; else one is made")
    add("--llama-python", metavar="PYTHON", help="an interpreter with llama-cpp-python; else one is made")
    add("--work", type=Path, metavar="DIR", help="keep checkpoints, forms and environments here")
    add("--report", type=Path, metavar="FILE", help="JSON, written after each round; what it has of other shapes stays")
    add("--render", action="store_true", help="only show --report again")
    add("--chart", type=Path, metavar="FILE", help="draw the ratios there, as a PNG")
    args = parser.parse_args()
    if args.quick:
        given = {name for name in QUICK if any(word.split("=")[0] == f"--{name}" for word in sys.argv)}
        vars(args).update({name: value for name, value in QUICK.items() if name not in given})
    if args.render and not (args.report and args.report.exists()):
        parser.error("--render needs a --report that exists")
    for name in ("rounds", "repeat", "threads"):
        if getattr(args, name) < 1:
            parser.error(f"--{name} must be at least 1")
    if args.new_tokens < 2:
        parser.error("--new-tokens must be at least 2")
    return args


def main() -> int:
    """Compare, or show a report again; 1 where a target was missed."""
    args = parse()
    if args.render:
        report = json.loads(args.report.read_text(encoding="utf-8"))
    else:
        with tempfile.TemporaryDirectory(prefix="edgelm-peers-") as scratch:
            work = (args.work or Path(scratch)).resolve()
            work.mkdir(parents=True, exist_ok=True)
            comparison = Comparison(args, work)
            for name in comparison.shapes:
                comparison.measure_shape(name)
            report = comparison.report
    print(markdown(report, args.judge))
    if args.chart:
        draw(report, args.judge, args.chart)
    judged = [each for name, shape in report["shapes"].items() for each in verdicts(name, shape, args.judge)]
    return 0 if all(each.met for each in judged) else 1


if __name__ == "__main__":
    sys.exit(main())
