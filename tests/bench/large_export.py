"""Time and peak memory of exporting a checkpoint of Qwen2.5-0.5B's shape, 988 MB in bfloat16; by hand.

`python -m tests.bench.large_export --work DIR [--calibrate FILE]` writes the checkpoint (random weights) once, then
exports it by the clip search and, with a text file, by GPTQ, each in a process of its own. Run it on a quiet machine.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

CONFIG = {
    "model_type": "qwen2",
    "vocab_size": 151936,
    "hidden_size": 896,
    "intermediate_size": 4864,
    "num_hidden_layers": 24,
    "num_attention_heads": 14,
    "num_key_value_heads": 2,
    "hidden_act": "silu",
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e6,
    "tie_word_embeddings": True,
    "use_sliding_window": False,
    "torch_dtype": "bfloat16",
    "bos_token_id": 0,
    "eos_token_id": 1,
}


def write_checkpoint(path: Path) -> None:
    """Random weights of the shape, and a tokenizer of bytes."""
    generator = np.random.default_rng(0)
    kind = ml_dtypes.bfloat16
    width, mlp, keys = CONFIG["hidden_size"], CONFIG["intermediate_size"], 2 * 64
    tensors = {}

    def matrix(name: str, rows: int, columns: int) -> None:
        tensors[f"{name}.weight"] = (generator.standard_normal((rows, columns), np.float32) * 0.03).astype(kind)

    matrix("model.embed_tokens", CONFIG["vocab_size"], width)
    for i in range(CONFIG["num_hidden_layers"]):
        layer = f"model.layers.{i}"
        for norm in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"{layer}.{norm}.weight"] = np.ones(width, kind)
        for name, rows in (("q", width), ("k", keys), ("v", keys)):
            matrix(f"{layer}.self_attn.{name}_proj", rows, width)
            tensors[f"{layer}.self_attn.{name}_proj.bias"] = np.zeros(rows, kind)
        matrix(f"{layer}.self_attn.o_proj", width, width)
        matrix(f"{layer}.mlp.gate_proj", mlp, width)
        matrix(f"{layer}.mlp.up_proj", mlp, width)
        matrix(f"{layer}.mlp.down_proj", width, mlp)
    tensors["model.norm.weight"] = np.ones(width, kind)
    path.mkdir(parents=True)
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    (path / "config.json").write_text(json.dumps(CONFIG), encoding="utf-8")
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: i for i, letter in enumerate(letters)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(path / "tokenizer.json"))


def measure(checkpoint: Path, out: Path, options: list[str]) -> dict[str, float]:
    """Export in a process; return seconds, peak resident megabytes, megabytes written."""
    shutil.rmtree(out, ignore_errors=True)
    command = [sys.executable, "-m", "edgelm", "export", str(checkpoint), str(out), "--json", *options]
    start = time.monotonic()
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        facts = json.loads(process.stdout.read())
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    return {
        "seconds": round(time.monotonic() - start, 1),
        "peak_mb": round(usage.ru_maxrss * 1024 / 1e6),
        "cpu_s": round(usage.ru_utime + usage.ru_stime, 1),
        "bundle_mb": round(facts["bytes"] / 1e6, 1),
        "bits_per_weight": facts["bits_per_weight"],
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="directory for the checkpoint and the bundles")
    parser.add_argument("--calibrate", metavar="FILE", help="text of at least 65,536 bytes, for GPTQ")
    args = parser.parse_args()
    checkpoint = args.work / "checkpoint"
    if not checkpoint.exists():  # by another process: what starts later inherits the peak of this one
        writer = multiprocessing.get_context("spawn").Process(target=write_checkpoint, args=(checkpoint,))
        writer.start()
        writer.join()
    print("clip", json.dumps(measure(checkpoint, args.work / "clip", [])), flush=True)
    if args.calibrate:
        print("gptq", json.dumps(measure(checkpoint, args.work / "gptq", ["--calibrate", args.calibrate])), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
