"""Converts GGUF metadata to a config.json, and GGUF tensor names to Hugging Face's.

Keys and tensor names are those of llama.cpp's `gguf-py/gguf/constants.py`. The changes that its converter
(`conversion/*.py`) makes to weights are undone here: it interleaves the rows of Llama's queries and keys, which
llama.cpp rotates in neighbouring pairs, and adds 1 to the factors of Gemma's norms.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from edgelm.errors import CheckpointError

from .gguf_file import GgufMetadata, GgufTensor

Read = Callable[[str], NDArray[np.float32]]
"""Reads a whole small tensor."""

ATTENTION: Final = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
}
MLP: Final = {"ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj"}
PRE_NORMS: Final = {"attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm"}
QK_NORMS: Final = {"attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm"}
POST_NORMS: Final = {
    "post_attention_norm": "post_attention_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
GEMMA_NORMS: Final = {"attn_norm": "input_layernorm", "ffn_norm": "pre_feedforward_layernorm", **POST_NORMS}
PHI: Final = {
    "attn_qkv": "self_attn.qkv_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_up": "mlp.gate_up_proj",
    "ffn_down": "mlp.down_proj",
}

SLIDING_WINDOW_PATTERNS: Final = {"gemma2": 2, "gemma3": 6}
"""Architectures with sliding layers, and the period of layers with full attention if the file has none."""

LAYERS_OF_27B: Final = {"gemma2": 46, "gemma3": 62}
"""Layers of Gemma's 27B, whose attention scale uses hidden size / heads; the other models use the head size."""


@dataclass(frozen=True, slots=True)
class GgufArchitecture:
    """How llama.cpp stores an architecture.

    model_type: that of config.json. layer: llama.cpp's name of a weight -> Hugging Face's. interleaved: rows of queries
    and keys are in llama.cpp's rotation order. norm_offset: value added to the stored norm factors.
    """

    model_type: str
    layer: Mapping[str, str]
    interleaved: bool = False
    norm_offset: float = 0.0


GGUF_ARCHITECTURES: Final = {
    "gemma2": GgufArchitecture("gemma2", {**ATTENTION, **MLP, **GEMMA_NORMS}, norm_offset=1.0),
    "gemma3": GgufArchitecture("gemma3_text", {**ATTENTION, **MLP, **GEMMA_NORMS, **QK_NORMS}, norm_offset=1.0),
    "granite": GgufArchitecture("granite", {**ATTENTION, **MLP, **PRE_NORMS}, interleaved=True),
    "llama": GgufArchitecture("llama", {**ATTENTION, **MLP, **PRE_NORMS}, interleaved=True),
    "mistral": GgufArchitecture("mistral", {**ATTENTION, **MLP, **PRE_NORMS}, interleaved=True),
    "olmo2": GgufArchitecture("olmo2", {**ATTENTION, **MLP, **QK_NORMS, **POST_NORMS}),
    "phi3": GgufArchitecture("phi3", {**PHI, **PRE_NORMS}),
    "qwen2": GgufArchitecture("qwen2", {**ATTENTION, **MLP, **PRE_NORMS}),
    "qwen3": GgufArchitecture("qwen3", {**ATTENTION, **MLP, **PRE_NORMS, **QK_NORMS}),
    "smollm3": GgufArchitecture("smollm3", {**ATTENTION, **MLP, **PRE_NORMS}, interleaved=True),
}

GLOBAL: Final = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}

FREQUENCIES, LONG, SHORT = "rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight"


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """The location of a tensor with Hugging Face's name.

    shape: from the configuration. heads: heads with interleaved rows, 0 if none. offset: value added to every element.
    """

    name: str
    shape: tuple[int, ...]
    heads: int = 0
    offset: float = 0.0


@dataclass(frozen=True, slots=True)
class _GgufModel:
    """A file's metadata and tensors. Keys are relative to the architecture's name."""

    metadata: GgufMetadata
    name: str
    tensors: Mapping[str, GgufTensor]
    read: Read

    def key(self, rest: str) -> str:
        return f"{self.name}.{rest}"

    def integer(self, rest: str, default: int | None = None, *, minimum: int = 1) -> int:
        return self.metadata.integer(self.key(rest), default, minimum=minimum)

    def number(self, rest: str, default: float | None = None) -> float:
        return self.metadata.number(self.key(rest), default)

    def flag(self, rest: str, default: bool) -> bool:
        return self.metadata.flag(self.key(rest), default)

    def has_key(self, rest: str) -> bool:
        return self.metadata.has_key(self.key(rest))

    def error(self, text: str) -> CheckpointError:
        return CheckpointError(f"{self.metadata.path}: {text}")


def read_gguf_config(metadata: GgufMetadata, tensors: Mapping[str, GgufTensor], read: Read) -> dict[str, Any]:
    """Return the config.json of a file's model.

    Raises `CheckpointError` for an unsupported architecture, for missing or wrong metadata, and for options of
    llama.cpp that the decoder does not have.
    """
    name, architecture = _architecture(metadata)
    model = _GgufModel(metadata, name, tensors, read)
    _refuse(model)
    hidden, heads = model.integer("embedding_length"), model.integer("attention.head_count")
    head_size = model.integer("attention.key_length", max(hidden // heads, 1))
    if model.integer("attention.value_length", head_size) != head_size:
        raise model.error("heads of keys and of values have different sizes, which is not supported")
    layers = model.integer("block_count")
    if layers > len(tensors) or "token_embd.weight" not in tensors:
        raise model.error(f"{len(tensors)} tensors are too few for {layers} layers and the embedding: it is incomplete")
    config: dict[str, Any] = {
        "model_type": architecture.model_type,
        "vocab_size": tensors["token_embd.weight"].shape[0],
        "hidden_size": hidden,
        "intermediate_size": model.integer("feed_forward_length"),
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": model.integer("attention.head_count_kv", heads),
        "head_dim": head_size,
        "max_position_embeddings": model.integer("context_length"),
        "rms_norm_eps": model.number("attention.layer_norm_rms_epsilon"),
        "tie_word_embeddings": "output.weight" not in tensors,
        "attention_bias": "blk.0.attn_q.bias" in tensors,
        "mlp_bias": "blk.0.ffn_gate.bias" in tensors,
        **_rope(model, head_size),
        **_windows(model, layers),
    }
    if name in LAYERS_OF_27B:
        config["query_pre_attn_scalar"] = hidden // heads if layers == LAYERS_OF_27B[name] else head_size
        for cap in ("attn_logit_softcapping", "final_logit_softcapping"):
            if model.has_key(cap):
                config[cap] = model.number(cap) or None
    if name == "granite":
        config.update(_multipliers(model, head_size))
    return config


def stored_tensors(
    config: Mapping[str, Any], metadata: GgufMetadata, tensors: Mapping[str, GgufTensor]
) -> dict[str, StoredTensor]:
    """Return the location of each tensor, by Hugging Face's name.

    Raises `CheckpointError` for a tensor whose shape differs from the configuration, and for an unknown tensor: leaving
    it out would give another model.
    """
    _, architecture = _architecture(metadata)
    found: dict[str, StoredTensor] = {}
    known = {FREQUENCIES, LONG, SHORT}
    for name, theirs, heads in _names(config, architecture):
        known.add(name)
        if name not in tensors:
            continue
        shape = _expected(config, theirs)
        if tensors[name].shape != shape:
            raise CheckpointError(
                f"{metadata.path}: {name} has shape {list(tensors[name].shape)}, the metadata says {list(shape)}"
            )
        offset = architecture.norm_offset if theirs.endswith("norm.weight") else 0.0
        found[theirs] = StoredTensor(name, shape, heads, offset)
    unknown = sorted(set(tensors) - known)
    if unknown:
        raise CheckpointError(
            f"{metadata.path}: the tensor {unknown[0]} (1 of {len(unknown)}) does not exist in a"
            f" {architecture.model_type} decoder: this variant of the architecture is not supported"
        )
    return found


def _architecture(metadata: GgufMetadata) -> tuple[str, GgufArchitecture]:
    name = metadata.text("general.architecture")
    if name not in GGUF_ARCHITECTURES:
        raise CheckpointError(
            f"{metadata.path}: architecture {name[:80]!r} is not supported; supported in GGUF files:"
            f" {', '.join(sorted(GGUF_ARCHITECTURES))}"
        )
    return name, GGUF_ARCHITECTURES[name]


def _refuse(model: _GgufModel) -> None:
    """Raise `CheckpointError` for options that change the arithmetic and are not supported."""
    if model.integer("expert_count", 0, minimum=0):
        raise model.error("a mixture of experts is not supported")
    if not model.flag("attention.causal", True):
        raise model.error("it is an encoder, not a causal language model")
    if model.name == "granite" and not model.flag("rope.scaling.finetuned", True):
        raise model.error("granite without rotary positions is not supported")
    if model.name == "olmo2" and model.integer("attention.sliding_window", 0, minimum=0):
        raise model.error("olmo2 with a sliding window (OLMo 3) is not supported")


def _multipliers(model: _GgufModel, head_size: int) -> dict[str, Any]:
    """Read Granite's multipliers; 0 means the default, as in llama.cpp."""
    return {
        "attention_multiplier": model.number("attention.scale", 0.0) or head_size**-0.5,
        "embedding_multiplier": model.number("embedding_scale", 0.0) or 1.0,
        "residual_multiplier": model.number("residual_scale", 0.0) or 1.0,
        "logits_scaling": model.number("logit_scale", 0.0) or 1.0,
    }


# --- positions ---


def _rope(model: _GgufModel, head_size: int) -> dict[str, Any]:
    """Read the rotary options: rope_theta, rope_scaling, partial_rotary_factor."""
    size = model.integer("rope.dimension_count", head_size)
    if size > head_size or (size != head_size and model.name != "phi3"):
        raise model.error(f"{model.key('rope.dimension_count')} must be the head size {head_size}, got {size}")
    rope: dict[str, Any] = {"rope_theta": model.number("rope.freq_base", 10_000.0)}
    if size != head_size:
        rope["partial_rotary_factor"] = _share(size, head_size)
    if model.name == "gemma3":
        rope["rope_local_base_freq"] = model.number("rope.freq_base_swa", 10_000.0)
    factor = model.number("rope.scaling.factor", 0.0) or model.number("rope.scale_linear", 0.0) or 1.0
    kind = model.metadata.text(model.key("rope.scaling.type"), "linear")
    if kind not in ("none", "linear", "yarn", "longrope"):
        raise model.error(f"{model.key('rope.scaling.type')} {kind[:80]!r} is not supported")
    if any(name in model.tensors for name in (FREQUENCIES, LONG, SHORT)):
        if kind == "yarn" or (kind == "linear" and factor != 1):
            raise model.error(f"{kind} scaling together with factors of each frequency is not supported")
        return {**rope, **_factors(model, size)}
    if kind == "longrope":
        raise model.error(f"it has longrope scaling and no tensor {LONG}: it is incomplete")
    if kind == "linear" and factor != 1:
        rope["rope_scaling"] = {"rope_type": "linear", "factor": factor}
    if kind == "yarn":
        rope["rope_scaling"] = _yarn(model, factor)
    return rope


def _share(size: int, head_size: int) -> float:
    """Return a float whose product with the head size, truncated to an integer, is `size`."""
    share = size / head_size
    return share if int(head_size * share) == size else math.nextafter(share, 1.0)


def _factors(model: _GgufModel, size: int) -> dict[str, Any]:
    """Read the factors of each pair's wavelength: one list for Llama 3, two for LongRoPE.

    Llama 3's rule is not stored, only its result: the same factors for every length.
    """
    context = model.integer("context_length")
    names = (FREQUENCIES, FREQUENCIES) if FREQUENCIES in model.tensors else (SHORT, LONG)
    values = []
    for name in names:
        if name not in model.tensors or model.tensors[name].shape != (size // 2,):
            raise model.error(f"{name} must hold {size // 2} numbers, one for each rotating pair")
        values.append([float(str(value)) for value in model.read(name)])
    options: dict[str, Any] = {"rope_type": "longrope", "short_factor": values[0], "long_factor": values[1]}
    if FREQUENCIES in model.tensors:
        return {"rope_scaling": {**options, "attention_factor": 1.0}, "original_max_position_embeddings": context}
    if model.has_key("rope.scaling.attn_factor"):
        options["attention_factor"] = model.number("rope.scaling.attn_factor")
    original = model.integer("rope.scaling.original_context_length", context)
    return {"rope_scaling": options, "original_max_position_embeddings": original}


def _yarn(model: _GgufModel, factor: float) -> dict[str, Any]:
    for name, value in (("yarn_log_multiplier", 0.0), ("yarn_ext_factor", 1.0), ("attn_factor", 1.0)):
        if model.number(f"rope.scaling.{name}", value) != value:
            raise model.error(f"{model.key('rope.scaling')}.{name} is not supported")
    context = model.integer("context_length")
    options: dict[str, Any] = {
        "rope_type": "yarn",
        "factor": factor,
        "original_max_position_embeddings": model.integer("rope.scaling.original_context_length", context),
        "beta_fast": model.number("rope.scaling.yarn_beta_fast", 32.0),
        "beta_slow": model.number("rope.scaling.yarn_beta_slow", 1.0),
    }
    if model.has_key("rope.scaling.yarn_attn_factor"):
        options["attention_factor"] = model.number("rope.scaling.yarn_attn_factor")
    return options


def _windows(model: _GgufModel, layers: int) -> dict[str, Any]:
    """Read which layers have a sliding window; the pattern is a number of layers or a list with one entry per layer."""
    window = model.integer("attention.sliding_window", 4096 if model.name == "gemma2" else 0, minimum=0)
    if model.name in ("phi3", "mistral"):
        return {"sliding_window": window or None}
    if model.name not in SLIDING_WINDOW_PATTERNS:
        return {}
    pattern = "attention.sliding_window_pattern"
    if not window:
        local = [False] * layers
    elif isinstance(model.metadata.values.get(model.key(pattern)), np.ndarray):
        local = [bool(each) for each in model.metadata.numbers(model.key(pattern), layers)]
    else:
        every = model.integer(pattern, SLIDING_WINDOW_PATTERNS[model.name])
        local = [i % every < every - 1 for i in range(layers)]
    kinds = ["sliding_attention" if each else "full_attention" for each in local]
    return {"sliding_window": window or None, "layer_types": kinds}


# --- tensors ---


def _names(config: Mapping[str, Any], architecture: GgufArchitecture) -> Iterator[tuple[str, str, int]]:
    """Yield every tensor's name in the file, Hugging Face's name, and the number of heads with interleaved rows."""
    for name, theirs in GLOBAL.items():
        yield name, theirs, 0
    heads = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}
    for i in range(config["num_hidden_layers"]):
        for name, theirs in architecture.layer.items():
            interleaved = heads.get(name, 0) if architecture.interleaved else 0
            for part in ("weight",) if name.endswith("norm") else ("weight", "bias"):
                yield f"blk.{i}.{name}.{part}", f"model.layers.{i}.{theirs}.{part}", interleaved


def _expected(config: Mapping[str, Any], theirs: str) -> tuple[int, ...]:
    """Return the shape of a tensor by Hugging Face's name."""
    hidden, mlp, size = config["hidden_size"], config["intermediate_size"], config["head_dim"]
    queries, keys = size * config["num_attention_heads"], size * config["num_key_value_heads"]
    *_, kind, part = theirs.split(".")
    shapes = {
        "embed_tokens": (config["vocab_size"], hidden),
        "lm_head": (config["vocab_size"], hidden),
        "q_proj": (queries, hidden),
        "k_proj": (keys, hidden),
        "v_proj": (keys, hidden),
        "qkv_proj": (queries + 2 * keys, hidden),
        "o_proj": (hidden, queries),
        "gate_proj": (mlp, hidden),
        "up_proj": (mlp, hidden),
        "gate_up_proj": (2 * mlp, hidden),
        "down_proj": (hidden, mlp),
    }
    if kind in ("q_norm", "k_norm"):
        whole = queries if kind == "q_norm" else keys
        return (whole if config["model_type"] == "olmo2" else size,)
    if kind not in shapes:
        return (hidden,)
    return shapes[kind][:1] if part == "bias" else shapes[kind]
