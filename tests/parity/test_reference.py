"""ReferenceModel, which calibration and the quality gate use, and calibration itself, for every architecture."""

from __future__ import annotations

import edgelm_export
import families
import numpy as np
import pytest
from tiny import TEXT

pytestmark = pytest.mark.usefixtures("one_torch_thread")

LONGROPE = {
    "original_max_position_embeddings": 64,
    "partial_rotary_factor": 0.5,
    "rope_scaling": {
        "type": "longrope",
        "short_factor": [1.0, 1.1, 1.3, 1.5],
        "long_factor": [2.0, 3.0, 5.0, 9.0],
    },
}
KINDS = {
    "llama": {"attention_bias": True, "mlp_bias": True},
    "mistral": {"sliding_window": 24, "tie_word_embeddings": False},
    "qwen2": {"use_sliding_window": True, "sliding_window": 17, "max_window_layers": 2},
    "qwen3": {"head_dim": 24, "tie_word_embeddings": True},
    "smollm3": {"no_rope_layers": [1, 0, 1]},
    "gemma2": {"head_dim": 16, "sliding_window": 20, "query_pre_attn_scalar": 20, "final_logit_softcapping": 4.0},
    "gemma3_text": {"head_dim": 16, "sliding_window": 12, "sliding_window_pattern": 2, "query_pre_attn_scalar": 16},
    "phi3": LONGROPE,
    "granite": {
        "embedding_multiplier": 3.0,
        "logits_scaling": 0.5,
        "residual_multiplier": 0.4,
        "attention_multiplier": 0.1,
    },
    "olmo2": {"num_attention_heads": 3, "num_key_value_heads": 1, "head_dim": 20, "hidden_size": 60},
}


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """Documents of 20 to 120 words: shorter and longer than windows and the original context."""
    generator = np.random.default_rng(0)
    words = " ".join(TEXT).split()
    documents = [" ".join(generator.choice(words, length)) for length in generator.integers(20, 120, 24)]
    file = tmp_path_factory.mktemp("text") / "text.txt"
    file.write_text("\n<|endoftext|>\n".join(documents), encoding="utf-8")
    return file


@pytest.mark.parametrize(("family", "options"), KINDS.items(), ids=KINDS)
def test_the_reference_is_the_float32_bundle_and_calibration_helps(family, options, text, tmp_path):
    network = families.random_model(family, **options)
    checkpoint = families.write(network, tmp_path / "model")
    exact = edgelm_export.export(checkpoint, tmp_path / "fp32", quant="fp32", verify=text).manifest.quality
    assert exact["kl_mean"] < 1e-8
    assert exact["perplexity"] == pytest.approx(exact["reference_perplexity"], rel=1e-5)
    kl = {}
    for method, calibrate in (("clip", None), ("gptq", text)):
        bundle = edgelm_export.export(
            checkpoint, tmp_path / method, block_size=32, method=method, calibrate=calibrate, verify=text
        )
        kl[method] = bundle.manifest.quality["kl_mean"]
    assert kl["gptq"] < 0.9 * kl["clip"]
