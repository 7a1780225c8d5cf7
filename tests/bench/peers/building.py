"""Each side's own form of a checkpoint, built once into the work folder, with what building took."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
import time
import venv
from collections import defaultdict
from pathlib import Path
from typing import Any, Final

from edgelm.bundle.bundle_folder import open_bundle
from tests.bench.peers.shapes import Facts
from tests.bench.peers.sides import Side

REPO: Final = Path(__file__).parents[3]
BENCH: Final = Path(__file__).parents[1]
SCRIPTS: Final = Path(__file__).parent / "measure"
NEEDS: Final = {
    "genai": ("onnxruntime-genai==0.18.0", "onnx", "onnx-ir", "transformers>=5,<6", "torch==2.13.0"),
    "llama_cpp": ("llama-cpp-python==0.3.36", "gguf", "safetensors", "ml_dtypes"),
}
"""What a virtual environment is made with where no interpreter is named."""

PRODUCTS: Final = ("MatMulNBits", "MatMul", "Gemm")
"""Operators that read their weights whole for every token."""


class Failed(Exception):
    """A side that cannot be built or measured; the message is the reason shown in the table."""


def make_venv(folder: Path, program: str) -> str:
    """Make a virtual environment of a peer's own; return its interpreter."""
    python = folder / "bin/python"
    if not (folder / "ready").exists():
        print(f"installing {NEEDS[program][0]} into a virtual environment of its own", file=sys.stderr)
        venv.create(folder, with_pip=True, clear=True)
        subprocess.run([python, "-m", "pip", "install", "-q", *NEEDS[program]], check=True)
        (folder / "ready").touch()
    return str(python)


def environment(work: Path) -> dict[str, str]:
    """Return the variables that children run with: this repository importable, edgelm's cache among the work."""
    path = os.pathsep.join(filter(None, [os.environ.get("PYTHONPATH"), str(REPO)]))
    return {"EDGELM_CACHE_DIR": str(work / "cache")} | os.environ | {"PYTHONPATH": path}


def reason(log: str) -> str:
    """Return the last line of a failed program's log that says something."""
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    return lines[-1][:200] if lines else "it said nothing"


def run_measured(command: list[str], log: Path, work: Path) -> dict[str, float]:
    """Run a command to its end; return its wall time and the peak resident memory of its process (MB of 1e6 bytes)."""
    started = time.perf_counter()
    with log.open("wb") as out:
        child = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, env=environment(work))
        _, status, usage = os.wait4(child.pid, 0)
        child.returncode = os.waitstatus_to_exitcode(status)
    if child.returncode:
        raise Failed(f"not built: {reason(log.read_text(encoding='utf-8', errors='replace'))}")
    return {"wall_s": time.perf_counter() - started, "peak_mb": usage.ru_maxrss * 1.024e-3}


def size_mb(path: Path) -> float:
    """Return the size of a file, or of all files below, in MB of 1e6 bytes."""
    files = [path] if path.is_file() else [each for each in path.rglob("*") if each.is_file()]
    return sum(each.stat().st_size for each in files) / 1e6


def read_mb(side: Side, path: Path, facts: Facts) -> float:
    """Return the MB of weights that a form reads to compute one token, as they lie on disk."""
    if side.program == "edgelm":
        matrices = open_bundle(path, verify=False).manifest.matrices
        return sum(each.bytes() for each in matrices if facts.tied or each.name != "embedding") / 1e6
    if side.program == "genai":
        return _graph_mb(path / "model.onnx")
    if side.program == "llama_cpp":
        return size_mb(path)  # without a vocabulary it holds nothing else
    return facts.parameters * (2 if side.job.get("dtype") == "bfloat16" else 4) / 1e6


def _graph_mb(path: Path) -> float:
    """Sum the weights that products of a graph read."""
    import onnx

    graph = onnx.load(path, load_external_data=False).graph
    users = defaultdict(set)
    for node in reversed(graph.node):  # what uses a value comes after it
        between = node.op_type in ("Cast", "Reshape", "Transpose")
        for name in node.input:
            users[name] |= users[node.output[0]] if between else {node.op_type}
    weights = [tensor for tensor in graph.initializer if users[tensor.name] & set(PRODUCTS)]
    return sum(int(entry.value) for each in weights for entry in each.external_data if entry.key == "length") / 1e6


class Builder:
    """Builds the forms of one checkpoint."""

    def __init__(self, work: Path, folder: Path, checkpoint: Path, pythons: dict[str, str], threads: int) -> None:
        self.work, self.folder, self.checkpoint, self.pythons, self.threads = work, folder, checkpoint, pythons, threads
        self.facts = Facts.of(checkpoint)
        self.record = folder / "built.json"

    def build(self, side: Side, given: Path | None) -> dict[str, Any]:
        """Return a form's path, its sizes, and what building it took if that happened here; build what is missing."""
        known = json.loads(self.record.read_text(encoding="utf-8")) if self.record.exists() else {}
        path = given or (self.checkpoint if side.program == "transformers" else self.folder / side.built)
        if not path.exists():
            print(f"building {side.built}", file=sys.stderr, flush=True)
            part = path.with_name(f"part-{path.name}")
            shutil.rmtree(part, ignore_errors=True)
            part.unlink(missing_ok=True)
            known[side.built] = self._make(side, part)
            part.rename(path)
            self.record.write_text(json.dumps(known), encoding="utf-8")
        sizes = {"size_mb": size_mb(path), "read_mb": read_mb(side, path, self.facts)}
        return {"path": str(path), **sizes, **({} if given else known.get(side.built, {}))}

    def _make(self, side: Side, out: Path) -> dict[str, float]:
        checkpoint, log = str(self.checkpoint), self.folder / f"{side.built}.log"
        if side.program == "edgelm":
            command = [sys.executable, "-m", "edgelm", "export", checkpoint, str(out), *shlex.split(side.form)]
        elif side.program == "llama_cpp":
            command = [self.pythons["llama_cpp"], str(SCRIPTS / "build_gguf.py"), str(self._float32()), str(out)]
            command += [side.form, str(self.threads)]
        elif side.program == "genai":
            command = [self.pythons["genai"], "-m", "onnxruntime_genai.models.builder", "-p", "int4", "-e", "cpu"]
            command += ["-i", checkpoint, "-o", str(out), "-c", str(self.folder / "genai-cache")]
            command += ["--extra_options", "int4_block_size=32", "int4_accuracy_level=4"]
        else:
            command = [sys.executable, str(SCRIPTS / "build_optimum.py"), checkpoint, str(out)]
        return run_measured(command, log, self.work)

    def _float32(self) -> Path:
        """Return llama.cpp's float32 file, from which it quantizes."""
        path = self.folder / "F32.gguf"
        if not path.exists():
            part = path.with_name("part-F32.gguf")
            script = str(BENCH / "gguf_checkpoint.py")
            command = [self.pythons["llama_cpp"], script, str(self.checkpoint), str(part)]
            run_measured(command, self.folder / "F32.gguf.log", self.work)
            part.rename(path)
        return path
