"""edgelm beside onnxruntime-genai, each on its own int4 export: `python -m tests.bench.peers`.

The checkpoint is a random Llama of SmolLM2-135M's shape, made here. All decode greedily, each measurement in a process
of its own, in turn, so that a noisy machine troubles all alike: what counts is the median of the ratios. genai is
measured twice: with the thread count that it chooses itself ("genai"), and with as many threads as edgelm. Run it by
hand on a quiet machine; it needs the extras cpu, export and distill.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import venv
from pathlib import Path
from typing import Any, Final

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

REPO: Final = Path(__file__).parents[2]
GENAI: Final = ("onnxruntime-genai==0.18.0", "onnx", "onnx-ir", "transformers>=5,<6", "torch==2.13.0")
RATES: Final = ("prefill_tok_s", "decode_tok_s")
SIDES: Final = ("edgelm", "genai", "genai-same-threads")
PEERS: Final = SIDES[1:]


def make_checkpoint(folder: Path) -> None:
    """Write a random bf16 Llama of SmolLM2-135M's shape, and a byte-level BPE trained on this repository."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        max_position_embeddings=8192,
        rope_theta=100000.0,
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
    )
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=4096, special_tokens=specials, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    sources = sorted((REPO / "edgelm").rglob("*.py")) + sorted((REPO / "tests").rglob("*.py"))
    tokenizer.train_from_iterator([path.read_text(encoding="utf-8") for path in sources], trainer)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token=specials[0], bos_token=specials[1], eos_token=specials[2]
    ).save_pretrained(folder)


def run_measured(command: list[str], log: Path) -> dict[str, float]:
    """Run a command to its end; return its wall time and the peak resident memory of its process."""
    started = time.perf_counter()
    with log.open("wb") as out:
        child = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT)
        _, status, usage = os.wait4(child.pid, 0)
        child.returncode = os.waitstatus_to_exitcode(status)
    if child.returncode:
        sys.exit(f"{' '.join(command)}\nfailed with {child.returncode}; see {log}")
    return {"wall_s": time.perf_counter() - started, "peak_mb": usage.ru_maxrss / 1024}


def size_mb(folder: Path) -> float:
    """Return the size of all files below, in MB of 1e6 bytes."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) / 1e6


def build(work: Path, genai_python: str) -> dict[str, dict[str, float]]:
    """Make the checkpoint and both exports, where they are not there yet."""
    checkpoint, edgelm_bundle, genai_model = work / "checkpoint", work / "edgelm", work / "genai"
    if not checkpoint.exists():
        print("making the checkpoint", file=sys.stderr)
        make_checkpoint(checkpoint)
    print("exporting with edgelm", file=sys.stderr)
    export = [sys.executable, "-m", "edgelm", "export", str(checkpoint), str(edgelm_bundle)]
    built = {"edgelm": run_measured([*export, "--quant", "int4", "--force"], work / "edgelm.log")}
    print("building with onnxruntime-genai", file=sys.stderr)
    builder = [genai_python, "-m", "onnxruntime_genai.models.builder", "-p", "int4", "-e", "cpu"]
    builder += ["-i", str(checkpoint), "-o", str(genai_model), "-c", str(work / "genai-cache")]
    builder += ["--extra_options", "int4_block_size=32", "int4_accuracy_level=4"]
    built["genai"] = run_measured(builder, work / "genai.log")
    for side, folder in (("edgelm", edgelm_bundle), ("genai", genai_model)):
        built[side]["size_mb"] = size_mb(folder)
    return built


def measure(side: str, work: Path, python: str, numbers: list[int]) -> dict[str, float]:
    """Measure one side in a process of its own; return the median of its runs."""
    program = side.partition("-")[0]
    script = Path(__file__).with_name(f"measure_{program}.py")
    if side == "genai":
        numbers = [0, *numbers[1:]]  # as it comes
    command = [python, str(script), str(work / program), *map(str, numbers)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    report = json.loads(done.stdout)
    rates = {rate: statistics.median(run[rate] for run in report["runs"]) for rate in RATES}
    return rates | {"load_s": report["load_s"]}


def compare(args: argparse.Namespace, work: Path) -> dict[str, Any]:
    """Build both, then measure both in turn; return every figure."""
    genai_python = args.genai_python or make_genai_venv(work / "venv-genai")
    built = build(work, genai_python)
    pythons = {"edgelm": sys.executable} | dict.fromkeys(PEERS, genai_python)
    numbers = [args.threads, args.prompt_tokens, args.new_tokens, args.repeat]
    rounds = []
    for turn in range(args.rounds):
        order = SIDES if turn % 2 == 0 else SIDES[::-1]
        rounds.append({side: measure(side, work, pythons[side], numbers) for side in order})
        print(f"round {turn + 1} of {args.rounds}: {json.dumps(rounds[-1])}", file=sys.stderr)
    ratios = {
        peer: {rate: [entry["edgelm"][rate] / entry[peer][rate] for entry in rounds] for rate in RATES}
        for peer in PEERS
    }
    return {"threads": args.threads, "built": built, "rounds": rounds, "ratios": ratios}


def make_genai_venv(folder: Path) -> str:
    """Make a virtual environment for onnxruntime-genai, whose transformers is newer than ours."""
    python = folder / "bin/python"
    if not python.exists():
        print("installing onnxruntime-genai into a virtual environment of its own", file=sys.stderr)
        venv.create(folder, with_pip=True)
        subprocess.run([python, "-m", "pip", "install", "-q", *GENAI], check=True)
    return str(python)


def spread(values: list[float], digits: int) -> str:
    """Return "median (least-most)"."""
    low, mid, high = min(values), statistics.median(values), max(values)
    return f"{mid:.{digits}f} ({low:.{digits}f}-{high:.{digits}f})"


def show(report: dict[str, Any]) -> None:
    """Print the figures as two tables."""
    print("| export | wall s | peak MB | size MB |\n|---|---|---|---|")
    for side, made in report["built"].items():
        print(f"| {side} | {made['wall_s']:.1f} | {made['peak_mb']:.0f} | {made['size_mb']:.1f} |")
    head = [
        f"{len(report['rounds'])} rounds, {report['threads']} threads",
        *SIDES,
        *(f"against {peer}" for peer in PEERS),
    ]
    print(f"\n| {' | '.join(head)} |\n|{'---|' * len(head)}")
    for rate in RATES:
        columns = [spread([entry[side][rate] for entry in report["rounds"]], 0) for side in SIDES]
        columns += [spread(report["ratios"][peer][rate], 2) for peer in PEERS]
        print(f"| {rate} | {' | '.join(columns)} |")


def main() -> int:
    """Compare; exit 1 where edgelm misses its targets beside genai as it comes: decode 1.0 times, prefill 1.5 times."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench.peers", description=__doc__, allow_abbrev=False)
    parser.add_argument(
        "--genai-python", metavar="PYTHON", help="an interpreter with onnxruntime-genai; else one is made"
    )
    parser.add_argument("--work", type=Path, metavar="DIR", help="keep checkpoint, exports and environment here")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--repeat", type=int, default=3, help="runs in a process, of which the median counts")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--prompt-tokens", type=int, default=256)
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--json", action="store_true", help="print every figure as one JSON object")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="edgelm-peers-") as scratch:
        work = args.work or Path(scratch)
        work.mkdir(parents=True, exist_ok=True)
        report = compare(args, work)
    if args.json:
        print(json.dumps(report))
    else:
        show(report)
    medians = {rate: statistics.median(values) for rate, values in report["ratios"]["genai"].items()}
    return 0 if medians["decode_tok_s"] >= 1.0 and medians["prefill_tok_s"] >= 1.5 else 1


if __name__ == "__main__":
    sys.exit(main())
