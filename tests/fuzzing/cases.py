"""Fuzzing cases by number: changes a bundle or checkpoint and uses it.

`prepare` creates the originals once. A case depends only on the seed and its number.
"""

from __future__ import annotations

import hashlib
import json
import random
import shutil
import struct
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
from shared_data import can_export

import edgelm
from edgelm.bundle.bundle_folder import open_bundle
from edgelm.bundle.manifest import MANIFEST
from edgelm.errors import EdgelmError
from edgelm.runtime import prepack
from edgelm.runtime.prefix_file import add_prefix
from edgelm.runtime.prepack import open_verified
from edgelm.runtime.runner import open_runner
from edgelm.system.board_cache import BoardCache

from . import files

PROMPT = "turn on the light " + "a" * 60 + "! " + "o" * 60 + "!\n"
MESSAGES = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "play <eos> music"}]
SUPPORTED_FORMATS = ("4:16", "4:32", "4:64", "4:128", "8:16", "8:32", "8:64", "8:128")

KINDS = {
    "graph": 34, "graph's bytes": 7, "data's bytes": 4, "manifest": 14, "tokenizer": 14, "template": 12, "prefix": 3,
}  # fmt: skip
EXPORTED = {"configuration": 5, "tokenizer files": 3, "safetensors": 4, "GGUF": 4, "adapter": 3}
"""More kinds, which need the export extra, like "graph"."""


def prepare(work: Path) -> None:
    """Create the original bundles, checkpoints and kernels."""
    from edgelm.kernels.compiler import main as compile_kernels

    work.mkdir(parents=True, exist_ok=True)
    bundles = work / "bundles"
    bundles.mkdir()
    own = open_bundle("builtin", verify=False)
    for name in ("builtin", "prefix"):
        (bundles / name).mkdir()
        for file in (*own.manifest.files, MANIFEST):
            shutil.copy(own.path / file, bundles / name)
    add_prefix(open_bundle(bundles / "prefix"), [1, 20, 30, 40], threads=1)
    if reason := compile_kernels([str(work / "kernels.so"), *SUPPORTED_FORMATS]):
        raise RuntimeError(reason)
    if can_export():
        _prepare_checkpoints(work)


def _prepare_checkpoints(work: Path) -> None:
    import edgelm_export
    from gguf import GGMLQuantizationType
    from gguf_files import write_gguf
    from tiny import TinyLlama, save_tensors, tokenizer_json, write_json

    shape = TinyLlama(hidden=64, layers=1, mlp=64, context=128, tied=False)
    shape.write(work / "checkpoint")
    TinyLlama(hidden=64, layers=1, mlp=64, context=128, shards=2, attention_bias=True).write(work / "sharded")
    for kind in (GGMLQuantizationType.Q8_0, GGMLQuantizationType.Q4_0):
        path = work / f"{kind.name}.gguf"
        write_gguf(path, shape.config(), shape.tensors(), kind=kind, tokenizer=tokenizer_json())
    adapter = work / "adapter"
    adapter.mkdir()
    options = {"peft_type": "LORA", "r": 4, "lora_alpha": 6, "bias": "none", "task_type": "CAUSAL_LM"}
    write_json(adapter / "adapter_config.json", {**options, "target_modules": ["q_proj"], "rank_pattern": {}})
    part = "base_model.model.model.layers.0.self_attn.q_proj"
    sizes = {f"{part}.lora_A.weight": (4, 64), f"{part}.lora_B.weight": (64, 4)}
    save_tensors(adapter, {name: np.ones(size, np.float32) for name, size in sizes.items()})
    (adapter / "model.safetensors").replace(adapter / "adapter_model.safetensors")
    for name, options in {"int8 cache": {"kv": "int8"}, "int4": {"symmetric": False, "quant": "int4"}}.items():
        edgelm_export.export(work / "sharded", work / "bundles" / name, fast=True, **options)


class Case:
    """One case; `what` describes it once `run` has started."""

    def __init__(self, work: Path, seed: int, number: int) -> None:
        self.rng = random.Random(f"{seed}:{number}")
        self.work = work
        kinds = KINDS if can_export() else {kind: weight for kind, weight in KINDS.items() if kind != "graph"}
        kinds = {**kinds, **(EXPORTED if can_export() else {})}
        self.kind = self.rng.choices(list(kinds), list(kinds.values()))[0]
        self.what = self.kind
        self.outcomes: list[str] = []
        """Result of each step."""

    def run(self, folder: Path) -> None:
        """Create the case in an empty folder and use it. Raises every exception except a one-line `EdgelmError`."""
        makers: dict[str, Callable[[Path], None]] = {
            "configuration": self._configuration, "tokenizer files": self._tokenizer_files, "safetensors": self._safetensors,
            "GGUF": self._gguf, "adapter": self._adapter,
        }  # fmt: skip
        if self.kind in makers:
            makers[self.kind](folder)
            return
        bundle = folder / "bundle"
        names = (
            [self.rng.choice(["prefix"])]
            if self.kind == "prefix"
            else sorted(p.name for p in (self.work / "bundles").iterdir())
        )
        self.what = f"{self.kind} of {(base := self.rng.choice(names))}"
        shutil.copytree(self.work / "bundles" / base, bundle)
        changes: dict[str, Callable[[Path], None]] = {
            "graph": self._graph, "graph's bytes": self._bytes_of("model.onnx"), "data's bytes": self._bytes_of("model.onnx.data"),
            "manifest": self._manifest, "tokenizer": self._tokenizer, "template": self._template, "prefix": self._prefix,
        }  # fmt: skip
        changes[self.kind](bundle)
        self._step("session", lambda: self._compute(bundle, None))
        if self.kind in ("graph", "graph's bytes", "data's bytes", "manifest", "prefix"):
            with self._kernels():
                self._step("kernels", lambda: self._compute(bundle, BoardCache(folder / "cache")))
        if not self.kind.startswith(("graph", "data")):
            self._step("model", lambda: self._generate(bundle))

    # -- changes of a bundle ------------------------------------------------------------------------------------

    def _graph(self, bundle: Path) -> None:
        path = bundle / "model.onnx"
        path.write_bytes(files.Graph(self.rng, path.read_bytes()).changed())
        seal(bundle)

    def _bytes_of(self, name: str) -> Callable[[Path], None]:
        def change(bundle: Path) -> None:
            path = bundle / name
            path.write_bytes(files.corrupt(self.rng, path.read_bytes()))
            seal(bundle)

        return change

    def _manifest(self, bundle: Path) -> None:
        path = bundle / MANIFEST
        if self.rng.random() < 0.15:
            path.write_bytes(files.corrupt(self.rng, path.read_bytes()))
            return
        path.write_text(
            files.as_json(files.change(self.rng, json.loads(path.read_text("utf-8")))), "utf-8", "surrogatepass"
        )

    def _tokenizer(self, bundle: Path) -> None:
        path = bundle / "tokenizer.json"
        if self.rng.random() < 0.15:
            path.write_bytes(files.corrupt(self.rng, path.read_bytes()))
        else:
            path.write_text(
                files.as_json(files.change_tokenizer(self.rng, json.loads(path.read_text("utf-8")))),
                "utf-8",
                "surrogatepass",
            )
        seal(bundle)

    def _template(self, bundle: Path) -> None:
        manifest = json.loads((bundle / MANIFEST).read_text("utf-8"))
        manifest["chat_template"] = files.template(self.rng, manifest["chat_template"] or "")
        self.what += f" {manifest['chat_template'][:200]!r}"
        (bundle / MANIFEST).write_text(json.dumps(manifest), "utf-8")

    def _prefix(self, bundle: Path) -> None:
        manifest = json.loads((bundle / MANIFEST).read_text("utf-8"))
        if self.rng.random() < 0.5:
            manifest["prefix"] = files.change(self.rng, manifest["prefix"])
        else:
            path = bundle / manifest["prefix"]["file"]
            path.write_bytes(files.corrupt(self.rng, path.read_bytes()))
        (bundle / MANIFEST).write_text(files.as_json(manifest), "utf-8", "surrogatepass")
        seal(bundle)

    # -- use of a bundle ----------------------------------------------------------------------------------------

    def _step(self, name: str, use: Callable[[], object]) -> None:
        """Run a step, which may raise a one-line `EdgelmError`."""
        try:
            use()
        except EdgelmError as error:
            message = str(error)
            self.outcomes.append(f"{name} refused: {message[:150]}")
            if not message.strip() or len(message.splitlines()) != 1:
                raise AssertionError(f"an error of {len(message.splitlines())} lines: {message!r:.300}") from error
            if len(message) > 20_000:
                raise AssertionError(f"an error of {len(message)} characters: {message[:300]!r}") from error
        else:
            self.outcomes.append(f"{name} answers")

    @contextmanager
    def _kernels(self) -> Iterator[None]:
        """Use the kernels compiled by `prepare`, also for bundles as small as these."""
        names = {
            "MIN_CACHED_BYTES": 0,
            "_compile": lambda library, _formats: shutil.copy(self.work / "kernels.so", library),
        }
        before = {name: getattr(prepack, name) for name in names}
        for name, value in names.items():
            setattr(prepack, name, value)
        try:
            yield
        finally:
            for name, value in before.items():
                setattr(prepack, name, value)

    def _compute(self, path: Path, cache: BoardCache | None) -> None:
        bundle = open_verified(path, cache)
        runner = open_runner(bundle, rows=2, threads=1, cache=cache, context=min(64, bundle.manifest.context))
        tokens = np.arange(2, 9) % bundle.manifest.vocab_size
        runner.prefill(0, tokens, 0)
        for step in range(3):
            runner.decode(tokens[step : step + 1], np.array([7 + step], np.int32))

    def _generate(self, path: Path) -> None:
        with edgelm.load(path, threads=1, max_batch=2, prefix_cache_mb=1, cache=False) as model:
            given = {"max_tokens": 3}
            self._step("prompt", lambda: model.generate(PROMPT, **given))
            self._step("sampled", lambda: model.generate("on", raw=True, temperature=1.0, logprobs=2, **given))
            self._step("messages", lambda: model.generate(messages=MESSAGES, tools=[{"name": "f"}], **given))
            self._step("session", lambda: model.generate(messages=MESSAGES[1:], session="s", **given))
            self._step("session", lambda: model.generate(messages=MESSAGES[1:], session="s", **given))
            self._step("score", lambda: model.score("light"))
            if self.kind == "tokenizer":
                self._step("choices", lambda: model.generate("on", choices=["on", "off"], **given))

    # -- checkpoints --------------------------------------------------------------------------------------------

    def _export(self, source: Path, folder: Path, **options: Any) -> None:
        import edgelm_export

        given = {"quant": self.rng.choice(["int4", "int8", "fp32"]), "fast": True, **options}
        self._step("export", lambda: edgelm_export.export(source, folder / "out", **given))
        if (folder / "out").exists():
            self._step("session", lambda: self._compute(folder / "out", None))
            self._step("model", lambda: self._generate(folder / "out"))

    def _change_json(self, path: Path) -> None:
        if self.rng.random() < 0.15:
            path.write_bytes(files.corrupt(self.rng, path.read_bytes()))
            return
        with suppress(RecursionError):  # an earlier change may be nested too deeply
            content = files.change(self.rng, json.loads(path.read_text("utf-8")), 2)
            path.write_text(files.as_json(content), "utf-8", "surrogatepass")

    def _copy_checkpoint(self, folder: Path) -> Path:
        source = folder / "checkpoint"
        shutil.copytree(self.work / self.rng.choice(["checkpoint", "sharded"]), source)
        return source

    def _configuration(self, folder: Path) -> None:
        source = self._copy_checkpoint(folder)
        path = source / "config.json"
        if self.rng.random() < 0.2:
            config = json.loads(path.read_text("utf-8"))
            config["model_type"] = self.rng.choice(
                ["qwen2", "qwen3", "gemma2", "gemma3_text", "phi3", "mistral", "granite", "olmo2", "smollm3", "x"]
            )
            path.write_text(json.dumps(config), "utf-8")
        elif self.rng.random() < 0.25:
            config = json.loads(path.read_text("utf-8"))
            scaling = {"rope_type": self.rng.choice(["llama3", "yarn", "longrope", "linear", "dynamic"]), "factor": 8.0,
                       "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64,
                       "short_factor": [1.0] * 8, "long_factor": [2.0] * 8}  # fmt: skip
            config["rope_scaling"] = files.change(self.rng, scaling)
            path.write_text(files.as_json(config), "utf-8", "surrogatepass")
        self._change_json(path)
        self._export(source, folder)

    def _tokenizer_files(self, folder: Path) -> None:
        source = self._copy_checkpoint(folder)
        if self.rng.random() < 0.4:
            self._change_json(source / "tokenizer_config.json")
        else:
            path = source / "tokenizer.json"
            path.write_text(
                files.as_json(files.change_tokenizer(self.rng, json.loads(path.read_text("utf-8")))),
                "utf-8",
                "surrogatepass",
            )
        self._export(source, folder)

    def _safetensors(self, folder: Path) -> None:
        source = self._copy_checkpoint(folder)
        index = source / "model.safetensors.index.json"
        if index.exists() and self.rng.random() < 0.5:
            self._change_json(index)
        else:
            self._change_safetensors(self.rng.choice(sorted(source.glob("*.safetensors"))))
        self._export(source, folder)

    def _change_safetensors(self, path: Path) -> None:
        data = path.read_bytes()
        (size,) = struct.unpack("<Q", data[:8])
        kind = self.rng.randrange(4)
        if kind == 0:
            data = files.corrupt(self.rng, data)
        elif kind == 1:
            data = struct.pack("<Q", self.rng.choice([0, 1, size - 1, size + 1, 2**31, 2**63, 2**64 - 1])) + data[8:]
        elif kind == 2:
            data = data[:8] + files.corrupt(self.rng, data[8 : 8 + size]) + data[8 + size :]
        else:
            header = files.as_json(files.change(self.rng, json.loads(data[8 : 8 + size]))).encode(
                "utf-8", "surrogatepass"
            )
            data = struct.pack("<Q", len(header)) + header + data[8 + size :]
        path.write_bytes(data)

    def _gguf(self, folder: Path) -> None:
        source = folder / "model.gguf"
        data = bytearray((self.work / self.rng.choice(["Q8_0.gguf", "Q4_0.gguf"])).read_bytes())
        texts = [
            data.find(name)
            for name in (b"llama.", b"tokenizer.ggml.", b"blk.0.", b"token_embd", b"output", b"general.")
        ]
        for _ in range(self.rng.randint(1, 4)):
            at = self.rng.choice([self.rng.randrange(200), self.rng.randrange(len(data)), self.rng.randrange(20_000)])
            if self.rng.random() < 0.5:
                found = data.find(
                    b".", self.rng.choice([place for place in texts if place >= 0]) + self.rng.randrange(3000)
                )
                at = max(0, found + self.rng.randrange(-30, 60))
            value = self.rng.choice(
                [0, 1, 2**31, 2**32 - 1, 2**62, 2**63, 2**64 - 1, 0x7FF8 << 48, self.rng.getrandbits(64)]
            )
            width = self.rng.choice([1, 4, 8])
            data[at : at + width] = struct.pack("<Q", value)[:width]
        source.write_bytes(bytes(data) if self.rng.random() < 0.7 else files.corrupt(self.rng, bytes(data)))
        options = {"quant": "keep"} if self.rng.random() < 0.3 else {}
        self._export(source, folder, **options)

    def _adapter(self, folder: Path) -> None:
        adapter = folder / "adapter"
        shutil.copytree(self.work / "adapter", adapter)
        path = adapter / "adapter_config.json"
        if self.rng.random() < 0.4:
            config = json.loads(path.read_text("utf-8"))
            name = self.rng.choice(
                [
                    "rank_pattern",
                    "alpha_pattern",
                    "target_modules",
                    "r",
                    "lora_alpha",
                    "use_rslora",
                    "modules_to_save",
                    "layers_to_transform",
                ]
            )
            config[name] = self.rng.choice(
                [{"(a+)+$": 4}, {"(.*)*q_proj": 4}, "(a|a)*b", "all-linear", *files.EXTREMES]
            )
            path.write_text(files.as_json(config), "utf-8", "surrogatepass")
        elif self.rng.random() < 0.5:
            self._change_json(path)
        else:
            self._change_safetensors(adapter / "adapter_model.safetensors")
        self._export(self.work / "checkpoint", folder, adapter=adapter)


def seal(bundle: Path) -> None:
    """Write the files' hashes and the prefix's weights digest into the manifest, if it can still be parsed."""
    try:
        manifest = json.loads((bundle / MANIFEST).read_text("utf-8"))
    except RecursionError:
        return
    names = [file.name for file in bundle.iterdir() if file.name != MANIFEST]
    content = {name: (bundle / name).read_bytes() for name in names}
    manifest["files"] = {
        name: {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()} for name, data in content.items()
    }
    if isinstance(manifest.get("prefix"), dict) and "weights" in manifest["prefix"]:
        own = [manifest["files"][name]["sha256"] for name in sorted(names) if name.startswith("model.onnx")]
        manifest["prefix"]["weights"] = hashlib.sha256("\n".join(own).encode()).hexdigest()
    (bundle / MANIFEST).write_text(files.as_json(manifest), "utf-8", "surrogatepass")


def raise_warnings() -> None:
    """Turn warnings into errors, except those about numbers that are not finite."""
    warnings.simplefilter("error")
    warnings.filterwarnings("ignore", category=DeprecationWarning)
    warnings.filterwarnings("ignore", message=".*(overflow|invalid value|divide by zero).*", category=RuntimeWarning)
