"""The int8 KV cache against transformers' float32, for each architecture's kind of attention."""

from __future__ import annotations

import families
import numpy as np
import pytest
from edgelm_export.int8_kv.int8_cache_graph import MIN_ONNXRUNTIME

import edgelm
from edgelm.runtime.divergence import DivergenceMeter
from edgelm.runtime.ort import ORT_RELEASE

pytestmark = [
    pytest.mark.usefixtures("one_torch_thread"),
    pytest.mark.skipif(tuple(map(int, MIN_ONNXRUNTIME.split("."))) > ORT_RELEASE, reason=f"needs {MIN_ONNXRUNTIME}"),
]

LONG = {"short_factor": [1 + i / 6 for i in range(6)], "long_factor": [2 + 3 * i for i in range(6)]}
GEMMA = {"head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 20}
CASES = {
    "soft caps and windows": ("gemma2", {**GEMMA, "attn_logit_softcapping": 1.0}),
    "head norms and two ropes": ("gemma3_text", {**GEMMA}),
    "padded heads under soft caps": ("gemma2", {**GEMMA, "head_dim": 12}),
    "half of a padded head rotates": ("phi3", {"hidden_size": 48, "partial_rotary_factor": 0.5, "sliding_window": 25}),
    "LongRoPE, rotated by a node": (
        "phi3",
        {
            "hidden_size": 48,
            "original_max_position_embeddings": 64,
            "rope_scaling": {"type": "longrope", **LONG},
        },
    ),
    "layers without rotary embedding": ("smollm3", {"no_rope_layers": [1, 0, 1]}),
}


@pytest.mark.parametrize(("family", "options"), CASES.values(), ids=CASES)
def test_predictions_stay_close_to_transformers(family, options, tmp_path, export_to_cache):
    network = families.random_model(family, **options)
    checkpoint = families.write(network, tmp_path / "model")
    bundle = export_to_cache(checkpoint, quant="fp32", kv="int8")
    prompt = families.random_prompt(network.config.vocab_size)
    expected = families.reference_logits(network, prompt)
    assert 0.5 < expected.std() < 5
    with edgelm.load(bundle, threads=1, max_batch=1) as model:
        found = [families.logits_of(model, prompt, pieces) for pieces in (67, len(prompt))]
    assert np.abs(found[0] - found[1]).max() < 0.05  # the cache does not depend on the chunks
    for logits in found:
        divergence = DivergenceMeter()
        divergence.add(expected[:-1], logits[:-1], np.array(prompt[1:]))
        result = divergence.result()
        assert 0 < result.kl_mean < 2e-3
        assert result.top1_agreement > 0.9
