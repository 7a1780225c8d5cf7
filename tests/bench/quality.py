"""What quantization costs, beside llama.cpp: `python -m tests.bench.quality --checkpoint DIR --text FILE`; by hand.

Every way to export the checkpoint, and every plain format of llama.cpp, is judged by one function on the same tokens
against the logits of the float32 bundle, next to the bits that it takes. llama.cpp joins in with `--llama-python`, an
interpreter that has `pip install llama-cpp-python gguf safetensors ml_dtypes`, or with `--llama-json`, an earlier
report's figures. Perplexities in float32 that differ by more than 0.1 % end the run: then nothing else can be compared.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final

import edgelm_export
import numpy as np
from edgelm_export.checkpoint import open_checkpoint
from numpy.typing import NDArray
from safetensors import safe_open

import edgelm
from edgelm.bundle.bundle_folder import Bundle
from edgelm.model import Model
from edgelm.runtime.memory_plan import PREFILL_CHUNK
from edgelm.text.documents import split_documents
from tests.bench.judge import Corpus, Logits, judge

CALIBRATE: Final = "--calibrate"
"""Stands in a setting for the file of that option; without the option such a setting is left out."""

SETTINGS: Final[list[dict[str, Any]]] = [
    *({"quant": "int8", "method": m, "block_size": b} for m in ("rtn", "clip") for b in (32, 64)),
    *(
        {"quant": "int4", "method": m, "block_size": b, "symmetric": s}
        for m in ("rtn", "clip", "hqq")
        for b in (16, 32, 64)
        for s in (True, False)
    ),
    *(
        {"quant": "int4", "method": "gptq", "block_size": b, "symmetric": s, "calibrate": CALIBRATE}
        for b in (16, 32, 64, 128)
        for s in (True, False)
    ),
    {"quant": "mixed", "calibrate": "self"},
    {"quant": "mixed", "calibrate": CALIBRATE},
]
"""Keyword arguments of `edgelm_export.export`, one row of the table each."""

CHOICES: Final[list[dict[str, Any]]] = [
    {"fast": True},
    {},
    {"calibrate": CALIBRATE},
    {"quant": "int5", "calibrate": CALIBRATE},
    {"quant": "mixed", "max_bytes": 108_000_000, "calibrate": CALIBRATE},
    {"quant": "int8"},
]
"""What a user chooses between; with `--choices` alone."""

LLAMA_FORMATS: Final = [f"Q{name}{mix}" for name in ("8_0", "5_1", "5_0", "4_1", "4_0") for mix in ("-pure", "")]
"""Formats of score_llama_cpp.py: without "-pure" llama.cpp stores some matrices, the embedding first, in more bits."""

WINDOW: Final = 512
"""Tokens of a window of `--windows`."""

TOLERANCE: Final = 1e-3
"""Largest relative difference of float32 perplexities."""

FLOAT32: Final = "fp32"

COLUMNS: Final = (
    *("runtime", "setting", "bits stored", "bits a weight", "bits on disk", "MB"),
    *("perplexity", "change", "KL", "KL p99", "top-1"),
)


@dataclass(frozen=True, slots=True)
class Bits:
    """Of the matrices per weight stored, padding too, and per weight of the model; of all files per parameter.

    Megabytes are those of the file with the weights.
    """

    stored: float
    weight: float
    disk: float
    megabytes: float


def bundle_logits(model: Model, corpus: Corpus, out: Path) -> Logits:
    """Compute a bundle's logits after every token into a file; return them mapped."""
    logits = np.lib.format.open_memmap(out, "w+", np.float32, (len(corpus.tokens), model.manifest.vocab_size))
    row = model.worker.call(lambda engine: engine.scratch_row)  # the one for scoring
    for start, ids in corpus.documents():
        for at in range(0, len(ids), PREFILL_CHUNK):
            piece = np.array(ids[at : at + PREFILL_CHUNK], np.int64)

            def prefill(engine: Any, piece: NDArray[np.int64] = piece, at: int = at) -> Logits:
                return engine.runner.prefill(row, piece, at, all_logits=True)

            logits[start + at : start + at + len(piece)] = model.worker.call(prefill)
    return logits


def transformers_logits(checkpoint: Path, corpus: Corpus, threads: int) -> Logits:
    """Compute the checkpoint's logits with transformers, in float32."""
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(threads)
    network = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32, use_safetensors=True).eval()
    with torch.inference_mode():
        parts = [network(torch.tensor([ids])).logits[0].numpy() for _, ids in corpus.documents()]
    return np.concatenate(parts)


def matrix_weights(checkpoint: Path) -> int:
    """Count the weights of a checkpoint's matrices, a tied head once."""
    opened = open_checkpoint(checkpoint)
    count = 0
    for name, file in opened.tensors.files.items():
        with safe_open(file, "np") as stored:
            shape = stored.get_slice(name).get_shape()
        if len(shape) == 2 and not (name == "lm_head.weight" and opened.config.get("tie_word_embeddings")):
            count += shape[0] * shape[1]
    return count


@dataclass
class Comparison:
    """What all are judged on and against, and the rows of the table so far."""

    checkpoint: Path
    corpus: Corpus
    measured_on: dict[str, Any]
    work: Path
    threads: int
    weights: int
    parameters: int
    reference: Logits
    report: Path | None
    rows: list[dict[str, Any]] = field(default_factory=list)

    def add(self, runtime: str, name: str, bits: Bits | None, logits: Logits, **more: Any) -> None:
        """Judge logits and add a row; float32 must agree with the reference."""
        agreement = judge(self.reference, logits, self.corpus)
        change = agreement.perplexity / agreement.reference_perplexity - 1
        row = {"runtime": runtime, "name": name, "change": change, **asdict(agreement), **more}
        self.rows.append(row | {"bits": asdict(bits) if bits else None})
        print(f"{runtime} {name}: {agreement}", file=sys.stderr, flush=True)
        self.save()
        if name == FLOAT32 and abs(change) > TOLERANCE:
            sys.exit(f"{runtime} in float32 differs from the reference by {change:+.2%}: something is wrong")

    def bundle_bits(self, bundle: Bundle) -> Bits:
        """Count a bundle's bits; on disk are also the graph itself, norms, rotary tables and alignment."""
        manifest = bundle.manifest
        matrices = 8 * sum(matrix.bytes() for matrix in manifest.matrices)
        files = 8 * sum(manifest.files[name].bytes for name in (manifest.graph, f"{manifest.graph}.data"))
        data = manifest.files[f"{manifest.graph}.data"].bytes / 1e6
        return Bits(manifest.bits_per_weight, matrices / self.weights, files / self.parameters, data)

    def adopt(self, path: Path) -> None:
        """Take over llama.cpp's rows of an earlier report on the same model and text."""
        earlier = json.loads(path.read_text(encoding="utf-8"))
        for name, value in self.measured_on.items():
            if earlier["measured_on"][name] != value:
                sys.exit(f"{path} was measured on another {name}: {earlier['measured_on'][name]}, here {value}")
        self.rows += [row for row in earlier["rows"] if row["runtime"] == "llama.cpp"]

    def save(self) -> None:
        """Write every figure so far, so that a run that breaks off has them too."""
        if self.report:
            figures = {"measured_on": self.measured_on, "rows": self.rows}
            self.report.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")

    def markdown(self) -> str:
        """Return the rows as a Markdown table."""
        lines = [f"| {' | '.join(COLUMNS)} |", "|---|---" + "|---:" * (len(COLUMNS) - 2) + "|"]
        for row in self.rows:
            bits = [f"{value:.2f}" for value in row["bits"].values()] if row["bits"] else [""] * 4
            figures = [
                f"{row['perplexity']:.4f}",
                f"{row['change']:+.2%}",
                f"{row['kl_mean']:.5f}",
                f"{row['kl_p99']:.4f}",
            ]
            cells = [row["runtime"], row["name"], *bits, *figures, f"{row['top1_agreement']:.1%}"]
            lines.append(f"| {' | '.join(cells)} |")
        return "\n".join(lines)


def add_edgelm(comparison: Comparison, settings: Iterable[dict[str, Any]]) -> None:
    """Export, load and judge every setting."""
    for setting in settings:
        with tempfile.TemporaryDirectory(dir=comparison.work) as scratch:
            bundle = edgelm_export.export(comparison.checkpoint, Path(scratch) / "bundle", **setting)
            with edgelm.load(bundle.path, threads=comparison.threads, max_batch=1) as model:
                logits = bundle_logits(model, comparison.corpus, Path(scratch) / "logits.npy")
            comparison.add("edgelm", label(setting), comparison.bundle_bits(bundle), logits)


def add_llama_cpp(comparison: Comparison, python: str, formats: Iterable[str]) -> None:
    """Convert the checkpoint, and judge llama.cpp in float32 and in every one of the formats."""
    source, tokens, out = (comparison.work / name for name in ("f32.gguf", "tokens.npz", "llama.npy"))
    np.savez(tokens, **asdict(comparison.corpus))
    ask(python, "gguf_checkpoint.py", comparison.checkpoint, source)
    for form in ("F32", *formats):
        said = ask(python, "score_llama_cpp.py", source, tokens, out, form, comparison.threads)
        size = 8 * said["matrix_bytes"]
        on_disk = 8 * said["bytes"] / comparison.parameters
        bits = Bits(size / said["matrix_weights"], size / comparison.weights, on_disk, said["bytes"] / 1e6)
        name = FLOAT32 if form == "F32" else form
        more = {"version": said["version"], "types": said["types"]}
        comparison.add("llama.cpp", name, bits, np.load(out, mmap_mode="r"), **more)


def ask(python: str, script: str, *arguments: object) -> dict[str, Any]:
    """Run a script beside this one in another interpreter; return the JSON object that it prints."""
    command = [python, str(Path(__file__).with_name(script)), *map(str, arguments)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    said: dict[str, Any] = json.loads(done.stdout)
    return said


def label(setting: dict[str, Any]) -> str:
    """Name a setting: values that speak for themselves, others with their name."""
    spoken = {
        "symmetric": {True: "symmetric", False: "asymmetric"},
        "calibrate": {setting.get("calibrate"): "calibrated", "self": "calibrated on itself"},
    }
    plain = ("quant", "method", "block_size")
    return " ".join(
        str(value) if name in plain else spoken[name][value] if name in spoken else f"{name}={value}"
        for name, value in setting.items()
    )


def choose(
    settings: Iterable[dict[str, Any]], methods: list[str] | None, calibrate: Path | None
) -> list[dict[str, Any]]:
    """Return the settings of these methods, with the calibration file in its place."""
    chosen = [setting for setting in settings if methods is None or setting.get("method", "auto") in methods]
    usable = [setting for setting in chosen if calibrate is not None or CALIBRATE not in setting.values()]
    for setting in chosen:
        if setting not in usable:
            print(f"left out for want of {CALIBRATE}: {label(setting)}", file=sys.stderr)
    return [{name: calibrate if value == CALIBRATE else value for name, value in s.items()} for s in usable]


def _windows(documents: list[list[int]], count: int) -> list[list[int]]:
    """Cut the first `count` windows of `WINDOW` tokens off the documents joined."""
    tokens = [token for ids in documents for token in ids]
    return [tokens[i * WINDOW : (i + 1) * WINDOW] for i in range(count)]


def sha256(file: Path) -> str:
    """Return the SHA-256 (hex) of a file."""
    return hashlib.sha256(file.read_bytes()).hexdigest()


def compare(args: argparse.Namespace, work: Path) -> Comparison:
    """Measure the reference and everything beside it."""
    text = args.text.read_text(encoding="utf-8")
    bundle = edgelm_export.export(args.checkpoint, work / "reference", quant="fp32")
    with edgelm.load(bundle.path, threads=args.threads, max_batch=1) as model:
        context = model.context
        documents = [model.document_tokens(document) for document in split_documents(text)]
        documents = [ids[:context] for ids in documents] if args.windows is None else _windows(documents, args.windows)
        corpus = Corpus(np.concatenate(documents), np.array([len(ids) for ids in documents]))
        reference = bundle_logits(model, corpus, work / "reference.npy")
    measured_on = {
        "text_sha256": sha256(args.text),
        "weights_sha256": [
            sha256(file) for file in sorted(set(open_checkpoint(args.checkpoint).tensors.files.values()))
        ],
        "tokens": len(corpus.scored()[0]),
    }
    weights, parameters = matrix_weights(args.checkpoint), bundle.manifest.parameters
    comparison = Comparison(
        args.checkpoint, corpus, measured_on, work, args.threads, weights, parameters, reference, args.json
    )
    comparison.add("edgelm", FLOAT32, comparison.bundle_bits(bundle), reference)
    comparison.add("transformers", FLOAT32, None, transformers_logits(args.checkpoint, corpus, args.threads))
    if args.llama_json:
        comparison.adopt(args.llama_json)
    elif args.llama_python:
        add_llama_cpp(comparison, args.llama_python, args.llama_formats)
    add_edgelm(comparison, choose(CHOICES if args.choices else SETTINGS, args.method, args.calibrate))
    return comparison


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, required=True)
    parser.add_argument("--text", type=Path, required=True, help="documents between lines of <|endoftext|>")
    parser.add_argument("--llama-python", metavar="PYTHON", help="an interpreter that has llama.cpp")
    parser.add_argument("--llama-formats", nargs="*", default=LLAMA_FORMATS, metavar="F", help="such as Q4_0-pure")
    parser.add_argument("--llama-json", type=Path, metavar="FILE", help="an earlier report to take llama.cpp from")
    parser.add_argument("--calibrate", type=Path, metavar="FILE", help="text for the methods that need one")
    parser.add_argument("--windows", type=int, metavar="N", help=f"the first N windows of {WINDOW} tokens of the text")
    parser.add_argument("--choices", action="store_true", help="only what a user chooses between, not every method")
    parser.add_argument("--method", nargs="*", help="only these of edgelm's methods")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every figure there")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="edgelm-quality-") as scratch:
        comparison = compare(args, Path(scratch))
        print(comparison.markdown())
    return 0


if __name__ == "__main__":
    sys.exit(main())
