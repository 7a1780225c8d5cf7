"""Reading each architecture's config.json: defaults, and both spellings of rope options."""

from __future__ import annotations

import math

import pytest

pytest.importorskip("onnx", reason="needs pip install 'edgelm[export]'")

from edgelm_export.architectures import find_architecture, load_architectures

from edgelm.errors import CheckpointError

SMALL = {
    "vocab_size": 331,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 8,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
}
ALL = sorted(load_architectures())
ROPE_SCALINGS = {
    "linear": {"factor": 4.0},
    "dynamic": {"factor": 2.0},
    "llama3": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 128,
    },
    "yarn": {
        "factor": 4.0,
        "original_max_position_embeddings": 128,
        "beta_fast": 16,
        "mscale": 1.0,
        "mscale_all_dim": 0.5,
        "truncate": False,
    },
    "longrope": {
        "short_factor": [1.0 + i / 8 for i in range(8)],
        "long_factor": [2.0 + i for i in range(8)],
        "original_max_position_embeddings": 128,
    },
}
SCALED = [(family, kind) for family in ALL for kind in ROPE_SCALINGS if (family, kind) != ("phi3", "yarn")]
"""Early Phi 3 checkpoints call LongRoPE yarn."""


def read(family, **options):
    """A decoder with the small shape; an option with the value ... is removed."""
    config = {**SMALL, "model_type": family, **options}
    return find_architecture(config).read_config({name: value for name, value in config.items() if value is not ...})


def windows(decoder):
    return [layer.window for layer in decoder.layers]


# --- defaults ---

EVERYTHING = [None] * 8
DEFAULTS = {
    "llama": ({}, 4, 16, False, 1e-6, 10_000.0, EVERYTHING),
    "mistral": ({"num_attention_heads": 8}, 8, 8, False, 1e-6, 10_000.0, [4096] * 8),
    "qwen2": ({"num_attention_heads": 32}, 32, 2, False, 1e-6, 10_000.0, EVERYTHING),
    "qwen3": ({"num_attention_heads": 32}, 32, 128, False, 1e-6, 10_000.0, EVERYTHING),
    "smollm3": ({}, 4, 16, True, 1e-6, 2_000_000.0, EVERYTHING),
    "gemma2": ({}, 4, 256, True, 1e-6, 10_000.0, [4096, None] * 4),
    "gemma3_text": ({}, 4, 256, True, 1e-6, 10_000.0, [4096] * 5 + [None] + [4096] * 2),
    "phi3": ({}, 4, 16, False, 1e-5, 10_000.0, EVERYTHING),
    "granite": ({}, 4, 16, False, 1e-6, 10_000.0, EVERYTHING),
    "olmo2": ({}, 4, 16, False, 1e-5, 10_000.0, EVERYTHING),
}


@pytest.mark.parametrize("family", DEFAULTS)
def test_missing_keys_take_the_family_defaults(family):
    options, kv_heads, head_size, tied, epsilon, theta, seen = DEFAULTS[family]
    decoder = read(family, num_key_value_heads=..., **options)
    assert (decoder.kv_heads, decoder.head_size, decoder.has_tied_head) == (kv_heads, head_size, tied)
    assert decoder.norm_epsilon == epsilon
    assert decoder.layers[0].rope.theta == theta
    assert decoder.layers[0].rope.kind == "default"
    assert windows(decoder) == seen
    assert decoder.activation == ("gelu_tanh" if family.startswith("gemma") else "silu")
    assert (decoder.vocab_size, decoder.hidden_size, decoder.mlp_size, decoder.context) == (331, 64, 96, 512)


@pytest.mark.parametrize("family", ALL)
def test_without_num_key_value_heads_there_is_one_for_each_head(family):
    assert read(family, num_key_value_heads=None).kv_heads == 4


def test_a_missing_context_is_the_family_default():
    contexts = dict.fromkeys(DEFAULTS, 2048)
    contexts |= {"mistral": 131_072, "qwen2": 32_768, "qwen3": 32_768, "smollm3": 32_768}
    contexts |= {"gemma2": 8192, "gemma3_text": 131_072, "phi3": 4096}
    assert {family: read(family, max_position_embeddings=...).context for family in DEFAULTS} == contexts


@pytest.mark.parametrize("family", ALL)
@pytest.mark.parametrize("name", ["vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads"])
def test_sizes_have_no_default(family, name):
    with pytest.raises(CheckpointError, match=rf"{name} .*None"):
        read(family, **{name: ...})


def test_smollm3_rotates_all_but_every_fourth_layer():
    assert [layer.rope is not None for layer in read("smollm3").layers] == [True, True, True, False] * 2
    listed = read("smollm3", no_rope_layers=[0, 1] * 4, no_rope_layer_interval=3)
    assert [layer.rope is not None for layer in listed.layers] == [False, True] * 4


def test_gemma_defaults():
    for family, caps in (("gemma2", (50.0, 30.0)), ("gemma3_text", (None, None))):
        decoder = read(family)
        assert (decoder.attention_softcap, decoder.logit_softcap) == caps
        assert decoder.attention_scale == 256**-0.5
        assert decoder.embedding_scale == 8.0
        assert decoder.norm_offset == 1.0
    assert read("gemma2", attn_logit_softcapping=None).attention_softcap is None
    everywhere, local = read("gemma3_text").layers[5], read("gemma3_text").layers[0]
    assert (everywhere.rope.theta, local.rope.theta) == (1_000_000.0, 10_000.0)


def test_granite_multipliers_are_one_by_default():
    decoder = read("granite")
    assert (decoder.embedding_scale, decoder.residual_scale, decoder.logit_scale, decoder.attention_scale) == (1,) * 4
    assert read("granite", logits_scaling=8).logit_scale == 0.125


@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
def test_qwen_slides_only_with_use_sliding_window_and_from_a_layer_on(family):
    assert windows(read(family, sliding_window=5, max_window_layers=0)) == EVERYTHING
    slides = {"use_sliding_window": True, "sliding_window": 5}
    assert windows(read(family, **slides)) == EVERYTHING  # default: from layer 28
    assert windows(read(family, **slides, max_window_layers=6)) == [None] * 6 + [5, 5]
    assert windows(read(family, **{**slides, "sliding_window": None}, max_window_layers=6)) == EVERYTHING
    kinds = ["sliding_attention"] + ["full_attention"] * 7
    assert windows(read(family, **slides, layer_types=kinds)) == [5] + [None] * 7


# --- the two spellings ---


@pytest.mark.parametrize(("family", "kind"), SCALED, ids=lambda value: value)
def test_rope_parameters_equal_rope_scaling(family, kind):
    options = {"rope_type": kind, **ROPE_SCALINGS[kind]}
    top = {"head_dim": 16, "original_max_position_embeddings": 128}
    old = read(family, rope_theta=5e5, rope_scaling=options, **top)
    new = {"rope_theta": 5e5, **options}
    if family == "gemma3_text":
        new = {"full_attention": new, "sliding_attention": {"rope_theta": 10_000.0, "rope_type": "default"}}
    assert read(family, rope_parameters=new, **top) == old
    assert read(family, rope_theta=5e5, rope_scaling={"type": kind, **ROPE_SCALINGS[kind]}, **top) == old
    assert kind in {rope.kind for rope in old.ropes}
    assert 5e5 in {rope.theta for rope in old.ropes}


def test_gemma3_sliding_layers_have_their_own_rope_options():
    new = {
        "full_attention": {"rope_theta": 1e6, "rope_type": "linear", "factor": 8.0},
        "sliding_attention": {"rope_theta": 1e4, "rope_type": "linear", "factor": 2.0},
    }
    decoder = read("gemma3_text", rope_parameters=new)
    local, everywhere = decoder.layers[0].rope, decoder.layers[5].rope
    assert (everywhere.theta, everywhere.factor, local.theta, local.factor) == (1e6, 8.0, 1e4, 2.0)


@pytest.mark.parametrize("name", ["full_attention", "sliding_attention"])
@pytest.mark.parametrize("missing", [{}, {"rope_type": "default"}, None, ...])
def test_gemma3_options_of_one_layer_type_may_be_missing(name, missing):
    """The defaults are those of transformers 4: one base for layers with full attention, one for the others."""
    other = {"full_attention": "sliding_attention", "sliding_attention": "full_attention"}[name]
    parameters = {other: {"rope_type": "linear", "factor": 3.0, "rope_theta": 7.0}, name: missing}
    given = {key: value for key, value in parameters.items() if value is not ...}
    decoder = read("gemma3_text", rope_parameters=given, rope_theta=5e5, rope_local_base_freq=500.0)
    ropes = {"sliding_attention": decoder.layers[0].rope, "full_attention": decoder.layers[5].rope}
    assert (ropes[other].kind, ropes[other].theta) == ("linear", 7.0)
    assert (ropes[name].kind, ropes[name].theta) == ("default", {"full_attention": 5e5}.get(name, 500.0))


def test_partial_rotation_is_read_in_either_place():
    assert read("phi3", partial_rotary_factor=0.5).rotary_size == 8
    assert read("phi3", rope_parameters={"rope_type": "default", "partial_rotary_factor": 0.5}).rotary_size == 8
    assert read("phi3").rotary_size == 16


def test_a_configured_factor_of_longrope_is_used():
    options = {"rope_type": "longrope", **ROPE_SCALINGS["longrope"]}
    for factor, expected in ((8.0, 8.0), (None, 4.0), (..., 4.0)):
        given = {name: value for name, value in {**options, "factor": factor}.items() if value is not ...}
        rope = read("llama", rope_scaling=given).layers[0].rope
        assert (rope.factor, rope.original_context) == (expected, 128)
        assert rope.attention_factor == pytest.approx(math.sqrt(1 + math.log(expected) / math.log(128)))


@pytest.mark.parametrize("name", ["su", "yarn", "longrope"])
def test_phi3_old_names_of_longrope(name):
    options = {name: value for name, value in ROPE_SCALINGS["longrope"].items() if name.endswith("factor")}
    decoder = read("phi3", original_max_position_embeddings=128, rope_scaling={"type": name, **options})
    rope = decoder.layers[0].rope
    assert (rope.kind, rope.original_context, rope.factor) == ("longrope", 128, 4.0)
    assert rope.attention_factor == pytest.approx(math.sqrt(1 + math.log(4) / math.log(128)))
    assert (decoder.long_from(512), decoder.long_from(128)) == (128, None)
