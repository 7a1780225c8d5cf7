"""GGUF files for the tests, written with the package `gguf` as llama.cpp's converter writes them."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf import GGMLQuantizationType as Kind

INTERLEAVED = ("llama", "mistral", "granite", "smollm3")
"""Architectures whose queries and keys the converter reorders."""

NAMES = {"gemma3_text": "gemma3", "mistral": "llama"}
"""Architectures with another name in llama.cpp."""

ARCHITECTURES = {name: kind for kind, name in gguf.MODEL_ARCH_NAMES.items()}
ROPE = gguf.RopeScalingType
TYPES = {"control": 3, "user": 4, "unused": 5, "byte": 6}


def write_gguf(
    path: Path,
    config: Mapping[str, Any],
    tensors: Mapping[str, np.ndarray],
    *,
    kind: Kind = Kind.F32,
    kinds: Mapping[str, Kind] | None = None,
    tokenizer: str | None = None,
    metadata: Mapping[str, Any] | None = None,
    writer: gguf.GGUFWriter | None = None,
) -> Path:
    """Write a model that is given as a config.json and tensors in Hugging Face's names.

    Matrices are stored as `kind`, those whose names in the file end with a key of `kinds` as that, vectors in float32.
    `metadata` goes in besides, over what the configuration says, or takes an entry out (None); `tokenizer` is a
    byte-level tokenizer.json.
    """
    family = str(config["model_type"])
    name = NAMES.get(family, family)
    if writer is None:
        writer = gguf.GGUFWriter(path, name)
    stated = {key.replace("{arch}", name): value for key, value in hyperparameters(name, config).items()}
    for key, value in {**stated, **(metadata or {})}.items():
        add(writer, key, value)
    if tokenizer is not None:
        for key, value in byte_level_metadata(tokenizer, int(config["vocab_size"])).items():
            if key not in (metadata or {}):
                add(writer, key, value)
    for stored, value in {**converted(family, name, config, tensors), **factors(config)}.items():
        wanted = next((chosen for ending, chosen in (kinds or {}).items() if stored.endswith(ending)), kind)
        store(writer, stored, value, wanted if value.ndim == 2 else Kind.F32)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def store(writer: gguf.GGUFWriter, name: str, value: np.ndarray, kind: Kind) -> None:
    """Add a tensor as `kind`; one that the library only dequantizes is filled with random blocks."""
    value = np.ascontiguousarray(value, np.float32)
    if kind in (Kind.F32, Kind.F16):
        writer.add_tensor(name, value if kind == Kind.F32 else value.astype(np.float16))
        return
    try:
        data = gguf.quantize(value, kind)
    except NotImplementedError:
        data = random_blocks(value.shape, kind, np.random.default_rng(len(name)))
    writer.add_tensor(name, data, raw_dtype=kind)


def random_blocks(shape: tuple[int, ...], kind: Kind, generator: np.random.Generator) -> np.ndarray:
    """Return random bytes of a format, uint8 [rows, bytes], whose half-precision scales are small and finite."""
    block, size = gguf.GGML_QUANT_SIZES[kind]
    data = generator.integers(0, 256, (*shape[:-1], shape[-1] // block, size), np.uint8)
    scale = np.frombuffer(np.float16(0.003).tobytes(), np.uint8)
    at = {"Q2_K": (80, 82), "Q3_K": (108,), "Q6_K": (208,), "Q4_K": (0, 2), "Q5_K": (0, 2)}.get(kind.name, (0,))
    for start in at:
        data[..., start : start + 2] = scale
    return data.reshape(*shape[:-1], -1)


def converted(
    family: str, name: str, config: Mapping[str, Any], tensors: Mapping[str, np.ndarray]
) -> dict[str, np.ndarray]:
    """Return the tensors under llama.cpp's names, changed as its converter changes them."""
    names = gguf.get_tensor_name_map(ARCHITECTURES[name], int(config["num_hidden_layers"]))
    found = {}
    for theirs, value in tensors.items():
        if theirs == "lm_head.weight" and config.get("tie_word_embeddings"):
            continue
        stored = names.get_name(theirs, try_suffixes=(".weight", ".bias"))
        assert stored is not None, theirs
        if family in INTERLEAVED and theirs.endswith(("q_proj.weight", "q_proj.bias")):
            value = interleaved(value, config["num_attention_heads"])
        if family in INTERLEAVED and theirs.endswith(("k_proj.weight", "k_proj.bias")):
            value = interleaved(value, config.get("num_key_value_heads") or config["num_attention_heads"])
        if family.startswith("gemma") and theirs.endswith("norm.weight"):
            value = value + np.float32(1)
        found[stored] = np.asarray(value, np.float32)
    return found


def interleaved(rows: np.ndarray, heads: int) -> np.ndarray:
    """Order each head's rows by rotary pair: (0, h, 1, h + 1, ...) for halves of h rows."""
    return rows.reshape(heads, 2, -1, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


def hyperparameters(name: str, config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the metadata that the converter derives from a configuration."""
    heads, hidden = config["num_attention_heads"], config["hidden_size"]
    keys = gguf.Keys
    found = {
        keys.LLM.BLOCK_COUNT: config["num_hidden_layers"],
        keys.LLM.CONTEXT_LENGTH: config["max_position_embeddings"],
        keys.LLM.EMBEDDING_LENGTH: hidden,
        keys.LLM.FEED_FORWARD_LENGTH: config["intermediate_size"],
        keys.LLM.VOCAB_SIZE: config["vocab_size"],
        keys.Attention.HEAD_COUNT: heads,
        keys.Attention.HEAD_COUNT_KV: config.get("num_key_value_heads") or heads,
        keys.Attention.LAYERNORM_RMS_EPS: float(config["rms_norm_eps"]),
        keys.Rope.FREQ_BASE: float(config.get("rope_theta") or 10000.0),
    }
    if config.get("head_dim") and name != "granite":
        found |= dict.fromkeys((keys.Attention.KEY_LENGTH, keys.Attention.VALUE_LENGTH), config["head_dim"])
    if name in ("llama", "granite", "smollm3"):
        found[keys.Rope.DIMENSION_COUNT] = config.get("head_dim") or hidden // heads
    if name == "phi3":
        found[keys.Rope.DIMENSION_COUNT] = int(config.get("partial_rotary_factor", 1.0) * hidden) // heads
        found[keys.Rope.SCALING_ORIG_CTX_LEN] = config["original_max_position_embeddings"]
        found[keys.Attention.SLIDING_WINDOW] = config.get("sliding_window") or 0
    if name in ("gemma2", "gemma3"):
        found[keys.Attention.SLIDING_WINDOW] = config["sliding_window"]
        for key, cap in (
            (keys.LLM.ATTN_LOGIT_SOFTCAPPING, "attn_logit_softcapping"),
            (keys.LLM.FINAL_LOGIT_SOFTCAPPING, "final_logit_softcapping"),
        ):
            if config.get(cap) is not None:
                found[key] = float(config[cap])
    if name == "granite":
        found |= {
            keys.Attention.SCALE: float(config["attention_multiplier"]),
            keys.LLM.EMBEDDING_SCALE: float(config["embedding_multiplier"]),
            keys.LLM.RESIDUAL_SCALE: float(config["residual_multiplier"]),
            keys.LLM.LOGIT_SCALE: float(config["logits_scaling"]),
        }
    return {**found, **scaling(config)}


def scaling(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the metadata of position scaling."""
    options = config.get("rope_scaling") or {}
    kind, keys = options.get("rope_type", options.get("type")), gguf.Keys.Rope
    if kind == "linear":
        return {keys.SCALING_TYPE: ROPE.LINEAR.value, keys.SCALING_FACTOR: float(options["factor"])}
    if kind == "yarn":
        found = {
            keys.SCALING_TYPE: ROPE.YARN.value,
            keys.SCALING_FACTOR: float(options["factor"]),
            keys.SCALING_ORIG_CTX_LEN: options["original_max_position_embeddings"],
        }
        named = {
            "attention_factor": "{arch}.rope.scaling.yarn_attn_factor",
            "beta_fast": "{arch}.rope.scaling.yarn_beta_fast",
            "beta_slow": "{arch}.rope.scaling.yarn_beta_slow",
        }
        return {**found, **{key: float(options[ours]) for ours, key in named.items() if ours in options}}
    if kind == "longrope":
        original = config["original_max_position_embeddings"]
        stretch = config["max_position_embeddings"] / original
        factor = math.sqrt(1 + math.log(stretch) / math.log(original)) if stretch > 1 else 1.0
        return {keys.SCALING_ATTN_FACTOR: factor}
    return {}


def factors(config: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Return the tensors of rotary factors: LongRoPE's lists, and what Llama 3's rule makes of each frequency."""
    options = config.get("rope_scaling") or {}
    kind = options.get("rope_type", options.get("type"))
    if kind == "longrope":
        return {
            f"rope_factors_{which}.weight": np.array(options[f"{which}_factor"], np.float32)
            for which in ("long", "short")
        }
    if kind != "llama3":
        return {}
    size = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    low, high = options["low_freq_factor"], options["high_freq_factor"]
    original, found = options["original_max_position_embeddings"], []
    for pair in range(size // 2):
        turns = original * config["rope_theta"] ** (-2 * pair / size) / (2 * math.pi)
        smooth = min(max((turns - low) / (high - low), 0.0), 1.0)
        found.append(1 / ((1 - smooth) / options["factor"] + smooth))
    return {"rope_freqs.weight": np.array(found, np.float32)}


def byte_level_metadata(tokenizer: str, rows: int, pre: str = "gpt-2") -> dict[str, Any]:
    """Return the metadata of a byte-level tokenizer.json, padded to `rows` tokens."""
    content = json.loads(tokenizer)
    ids = {**content["model"]["vocab"], **{token["content"]: token["id"] for token in content["added_tokens"]}}
    tokens = [f"[PAD{i}]" for i in range(rows)]
    types = [TYPES["unused"]] * rows
    for text, token in ids.items():
        tokens[token], types[token] = text, 1
    for token in content["added_tokens"]:
        types[token["id"]] = TYPES["control" if token["special"] else "user"]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.merges": [" ".join(merge) for merge in content["model"]["merges"]],
        "tokenizer.ggml.bos_token_id": 0,
        "tokenizer.ggml.eos_token_id": 1,
        "tokenizer.ggml.add_bos_token": content["post_processor"] is not None,
    }


def add(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    """Add an entry of the metadata in the type that llama.cpp expects; None adds nothing."""
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    elif value is not None:
        writer.add_array(key, value)
