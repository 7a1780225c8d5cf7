"""A Hugging Face Llama or Qwen2 checkpoint as a float32 GGUF file: run by an interpreter that has llama.cpp.

Usage: python gguf_checkpoint.py CHECKPOINT OUT.gguf. Prints one JSON object. The file has no
vocabulary, only its size: llama.cpp is fed token ids. It needs gguf, ml_dtypes, numpy and safetensors.
"""

import json
import sys
from importlib.metadata import version
from pathlib import Path

import gguf
import ml_dtypes  # noqa: F401  registers bfloat16 with numpy, which safetensors then returns
import numpy as np
from safetensors import safe_open

BLOCK = 32
"""Weights that share a scale in llama.cpp's plain formats: a row must hold whole blocks, or it stays unquantized."""

LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
"""llama.cpp's name of a layer's weight -> the checkpoint's."""


BIASED = ("attn_q", "attn_k", "attn_v")
"""Weights that have a bias in Qwen2."""


def interleave(rows, heads):
    """Order each head's rows by rotary pair, as llama.cpp rotates Llama: (0, h, 1, h + 1, ...) for halves of h rows."""
    halves = rows.reshape(heads, 2, -1, rows.shape[-1])  # [heads, 2, head size / 2, width]
    return np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(rows.shape)


def pad_mlp(name, weight, extra):
    """Add hidden units of zeros to the MLP: they contribute exactly nothing, in any precision."""
    if name in ("ffn_gate", "ffn_up"):
        return np.pad(weight, ((0, extra), (0, 0)))
    return np.pad(weight, ((0, 0), (0, extra))) if name == "ffn_down" else weight


def check(config):
    """Refuse what this writer does not know."""
    if config["model_type"] not in ("llama", "qwen2"):
        sys.exit(f"model_type must be llama or qwen2, got {config['model_type']}")
    for name, value in {"rope_scaling": None, "attention_bias": False, "mlp_bias": False}.items():
        if (config.get(name) or None) != (value or None):
            sys.exit(f"{name} must be {value}, got {config.get(name)}")
    heads, width = config["num_attention_heads"], config["hidden_size"]
    size = config.get("head_dim") or width // heads
    if width % BLOCK or heads * size % BLOCK:
        sys.exit(f"hidden size and heads x head size must be multiples of {BLOCK}, got {width} and {heads} x {size}")
    return size


def main():
    source, out = Path(sys.argv[1]), sys.argv[2]
    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    size = check(config)
    architecture = config["model_type"]
    heads, kv_heads = config["num_attention_heads"], config.get("num_key_value_heads") or config["num_attention_heads"]
    extra = -config["intermediate_size"] % BLOCK
    files = {}
    for path in sorted(source.glob("*.safetensors")):
        opened = safe_open(path, "np")
        files.update(dict.fromkeys(opened.keys(), opened))

    def tensor(name):
        return files[name].get_tensor(name).astype(np.float32)

    writer = gguf.GGUFWriter(out, architecture)
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)
    writer.add_vocab_size(config["vocab_size"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"] + extra)
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_key_length(size)
    writer.add_value_length(size)
    writer.add_rope_dimension_count(size)
    writer.add_rope_freq_base(config.get("rope_theta", 10000.0))
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_tokenizer_model("no_vocab")
    writer.add_tensor("token_embd.weight", tensor("model.embed_tokens.weight"))
    for i in range(config["num_hidden_layers"]):
        for name, theirs in LAYER.items():
            weight = tensor(f"model.layers.{i}.{theirs}.weight")
            if architecture == "llama" and name in ("attn_q", "attn_k"):
                weight = interleave(weight, heads if name == "attn_q" else kv_heads)
            writer.add_tensor(f"blk.{i}.{name}.weight", pad_mlp(name, weight, extra))
            if architecture == "qwen2" and name in BIASED:
                writer.add_tensor(f"blk.{i}.{name}.bias", tensor(f"model.layers.{i}.{theirs}.bias"))
    writer.add_tensor("output_norm.weight", tensor("model.norm.weight"))
    if not config.get("tie_word_embeddings"):
        writer.add_tensor("output.weight", tensor("lm_head.weight"))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    print(json.dumps({"version": version("gguf"), "mlp_padding": extra}))


if __name__ == "__main__":
    main()
