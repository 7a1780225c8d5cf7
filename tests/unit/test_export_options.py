"""What an export may be asked for: values out of range and options that contradict are refused before any work."""

from __future__ import annotations

import pytest

pytest.importorskip("onnx", reason="needs pip install 'edgelm[export]'")

from edgelm_export.options import ExportOptions
from edgelm_export.quantize.spec import QuantSpec

from edgelm.errors import EdgelmError

FILE = "text.txt"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"quant": "int3"}, "quant must be one of fp32, int8, int6, int5, int4, mixed, keep, got 'int3'"),
        ({"method": "awq"}, "method must be one of auto, rtn, clip, hqq, gptq"),
        ({"via": "torch"}, "via must be one of native, optimum"),
        ({"block_size": 48}, "block size must be one of 16, 32, 64, 128, got 48"),
        ({"max_kl": 0.0, "verify": FILE}, "max_kl must lie in"),
        ({"max_kl": float("nan"), "verify": FILE}, "max_kl must lie in"),
        ({"min_agreement": 1.5, "verify": FILE}, "min_agreement must lie in"),
        ({"max_bytes": 0}, "max_bytes must be positive"),
        ({"vocab": FILE}, "--vocab-size"),
        ({"vocab_size": 100}, "--vocab FILE"),
        ({"method": "gptq", "fast": True}, "--fast quantizes without calibration: it does not go with --method gptq"),
        ({"calibrate": FILE, "fast": True}, "it does not go with --calibrate"),
        ({"embedding_bits": 7}, "embedding bits must be one of 4, 5, 6, 8, got 7"),
        ({"embedding_bits": 4, "quant": "int8"}, "--embedding-bits does not go with --quant int8"),
        ({"embedding_bits": 4, "via": "optimum"}, "--embedding-bits does not go with --via optimum"),
        ({"max_kl": 0.1}, "need --verify FILE"),
        ({"min_agreement": 0.9}, "need --verify FILE"),
        ({"quant": "mixed", "fast": True}, "needs text to measure with"),
        ({"max_bytes": 10**6, "method": "clip"}, "needs text to measure with"),
        ({"quant": "fp32", "max_bytes": 10**6, "verify": FILE}, "--max-bytes does not go with --quant fp32"),
        ({"quant": "fp32", "calibrate": FILE}, "--calibrate has no use with --quant fp32"),
        ({"quant": "int8", "calibrate": FILE}, "--calibrate has no use with --quant int8"),
        ({"method": "clip", "calibrate": FILE}, "--calibrate has no use with --quant int4 and --method clip"),
        ({"via": "optimum", "calibrate": FILE}, "--calibrate does not go with --via optimum"),
        ({"via": "optimum", "adapter": "lora/"}, "--adapter does not go with --via optimum"),
        ({"via": "optimum", "vocab": FILE, "vocab_size": 9}, "--vocab does not go with --via optimum"),
        ({"kv": "int4"}, "kv must be one of fp32, int8, got 'int4'"),
        ({"via": "optimum", "kv": "int8"}, "--kv int8 does not go with --via optimum"),
        ({"via": "optimum", "report": True}, "--report does not go with --via optimum"),
    ],
    ids=str,
)
def test_nonsense_is_refused(options, message):
    with pytest.raises(EdgelmError) as caught:
        ExportOptions(**options)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("options", "spec"),
    [
        ({}, QuantSpec(4, 32, True, "gptq")),
        ({"fast": True}, QuantSpec(4, 32, True, "clip")),
        ({"quant": "int5", "fast": True}, QuantSpec(5, 32, True, "clip")),
        ({"quant": "int6", "block_size": 16, "symmetric": False}, QuantSpec(6, 32, True, "gptq")),
        ({"via": "optimum"}, QuantSpec(4, 32, True, "clip")),
        ({"calibrate": FILE}, QuantSpec(4, 32, True, "gptq")),
        ({"method": "hqq", "symmetric": False, "block_size": 64}, QuantSpec(4, 64, False, "hqq")),
        ({"quant": "int8"}, QuantSpec(8, 32, True, "rtn")),
        ({"quant": "int8", "method": "gptq", "calibrate": FILE, "block_size": 128}, QuantSpec(8, 128, True, "gptq")),
        ({"quant": "mixed", "calibrate": FILE}, QuantSpec(4, 32, True, "gptq")),
        ({"quant": "mixed", "verify": FILE, "fast": True}, QuantSpec(4, 32, True, "clip")),
        ({"quant": "fp32"}, None),
        ({"quant": "fp32", "kv": "int8", "calibrate": FILE}, None),  # whose text is for the cache alone
        ({"quant": "int8", "kv": "int8", "calibrate": FILE}, QuantSpec(8, 32, True, "rtn")),
    ],
    ids=str,
)
def test_the_plan_before_any_budget(options, spec):
    assert ExportOptions(**options).plan.default == spec


@pytest.mark.parametrize(
    ("options", "budget"),
    [
        ({}, False),
        ({"quant": "mixed", "calibrate": FILE}, True),
        ({"max_bytes": 10**6, "calibrate": FILE}, True),
        ({"max_kl": 0.1, "verify": FILE}, True),
        ({"quant": "int8", "max_kl": 0.1, "verify": FILE}, False),  # there only a gate
        ({"via": "optimum", "max_kl": 0.1, "verify": FILE}, False),
    ],
    ids=str,
)
def test_when_matrices_are_chosen_one_by_one(options, budget):
    assert ExportOptions(**options).has_budget is budget


@pytest.mark.parametrize(
    ("options", "name", "spec"),
    [
        ({}, "embedding", QuantSpec(5, 64, True, "gptq")),
        ({}, "head", QuantSpec(5, 64, True, "gptq")),
        ({}, "layer.3.gate_up", QuantSpec(4, 32, True, "gptq")),
        ({"block_size": 32}, "embedding", QuantSpec(5, 32, True, "gptq")),
        ({"embedding_bits": 8}, "embedding", QuantSpec(8, 32, True, "rtn")),
        ({"embedding_bits": 4}, "embedding", QuantSpec(4, 32, True, "gptq")),
        ({"quant": "int5"}, "embedding", QuantSpec(5, 64, True, "gptq")),
        ({"quant": "int5"}, "layer.3.gate_up", QuantSpec(5, 64, True, "gptq")),
        ({"quant": "int5"}, "layer.3.down", QuantSpec(5, 32, True, "gptq")),
        ({"quant": "int5", "block_size": 32}, "layer.3.gate_up", QuantSpec(5, 32, True, "gptq")),
        ({"quant": "int6"}, "embedding", QuantSpec(6, 32, True, "gptq")),
        ({"quant": "int8"}, "embedding", QuantSpec(8, 32, True, "rtn")),
        ({"via": "optimum"}, "embedding", QuantSpec(4, 32, True, "clip")),
    ],
    ids=str,
)
def test_the_plan_of_a_matrix(options, name, spec):
    assert ExportOptions(**options).plan.spec(name) == spec


@pytest.mark.parametrize(
    ("options", "calibration"),
    [
        ({}, "self"),
        ({"calibrate": FILE}, FILE),
        ({"fast": True}, None),
        ({"method": "clip"}, None),
        ({"quant": "int8"}, None),
        ({"quant": "int8", "method": "gptq"}, "self"),
        ({"quant": "fp32"}, None),
        ({"quant": "keep"}, None),
        ({"via": "optimum"}, None),
    ],
    ids=str,
)
def test_what_is_calibrated_on(options, calibration):
    assert ExportOptions(**options).chosen_calibration == calibration
