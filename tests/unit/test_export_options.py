"""Export options: bad values and contradictions are refused, and the plan, budget and calibration that follow."""

from __future__ import annotations

import pytest

pytest.importorskip("onnx", reason="needs pip install 'edgelm[export]'")

from edgelm_export.options import ExportOptions
from edgelm_export.quantize.matrix_plan import BITS
from edgelm_export.quantize.methods import method_names
from edgelm_export.quantize.spec import QuantSpec

from edgelm.cli.export import find_methods
from edgelm.errors import EdgelmError

FILE = "text.txt"


@pytest.mark.parametrize(
    ("options", "facts"),
    [
        ({"quant": "int3"}, ["quant", *BITS, "'int3'"]),
        ({"method": "awq"}, ["method", "auto", *method_names(), "'awq'"]),
        ({"via": "torch"}, ["via", "native", "optimum"]),
        ({"block_size": 48}, ["block_size", "16, 32, 64, 128", "48"]),
        ({"max_kl": 0.0, "verify": FILE}, ["max_kl", "(0, inf]", "0.0"]),
        ({"max_kl": float("nan"), "verify": FILE}, ["max_kl", "nan"]),
        ({"min_agreement": 1.5, "verify": FILE}, ["min_agreement", "(0, 1.0]", "1.5"]),
        ({"max_bytes": 0}, ["max_bytes"]),
        ({"vocab": FILE}, ["--vocab-size"]),
        ({"vocab_size": 100}, ["--vocab FILE"]),
        ({"method": "gptq", "fast": True}, ["--fast", "--method gptq"]),
        ({"calibrate": FILE, "fast": True}, ["--fast", "--calibrate"]),
        ({"embedding_bits": 7}, ["embedding_bits", "4, 5, 6, 8", "7"]),
        ({"embedding_bits": 4, "quant": "int8"}, ["--embedding-bits", "--quant int8"]),
        ({"embedding_bits": 4, "via": "optimum"}, ["--embedding-bits", "--via optimum"]),
        ({"max_kl": 0.1}, ["--max-kl", "--verify FILE"]),
        ({"min_agreement": 0.9}, ["--min-agreement", "--verify FILE"]),
        ({"quant": "mixed", "fast": True}, ["--calibrate FILE"]),
        ({"max_bytes": 10**6, "method": "clip"}, ["--calibrate FILE"]),
        ({"quant": "fp32", "max_bytes": 10**6, "verify": FILE}, ["--max-bytes", "--quant fp32"]),
        ({"quant": "fp32", "calibrate": FILE}, ["--calibrate", "--quant fp32"]),
        ({"quant": "int8", "calibrate": FILE}, ["--calibrate", "--quant int8"]),
        ({"method": "clip", "calibrate": FILE}, ["--calibrate", "--quant int4", "--method clip"]),
        ({"via": "optimum", "calibrate": FILE}, ["--calibrate", "--via optimum"]),
        ({"via": "optimum", "adapter": "lora/"}, ["--adapter", "--via optimum"]),
        ({"via": "optimum", "vocab": FILE, "vocab_size": 9}, ["--vocab", "--via optimum"]),
        ({"kv": "int4"}, ["kv", "fp32, int8", "'int4'"]),
        ({"via": "optimum", "kv": "int8"}, ["--kv int8", "--via optimum"]),
        ({"via": "optimum", "report": True}, ["--report", "--via optimum"]),
    ],
    ids=str,
)
def test_bad_values_and_contradictions_are_refused(options, facts):
    with pytest.raises(EdgelmError) as caught:
        ExportOptions(**options)
    assert all(fact in str(caught.value) for fact in facts), caught.value


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
        ({"quant": "fp32", "kv": "int8", "calibrate": FILE}, None),  # the text is for the KV cache only
        ({"quant": "int8", "kv": "int8", "calibrate": FILE}, QuantSpec(8, 32, True, "rtn")),
    ],
    ids=str,
)
def test_the_plan_before_a_budget(options, spec):
    assert ExportOptions(**options).plan.default == spec


@pytest.mark.parametrize(
    ("options", "budget"),
    [
        ({}, False),
        ({"quant": "mixed", "calibrate": FILE}, True),
        ({"max_bytes": 10**6, "calibrate": FILE}, True),
        ({"max_kl": 0.1, "verify": FILE}, True),
        ({"quant": "int8", "max_kl": 0.1, "verify": FILE}, False),  # only a limit to check
        ({"via": "optimum", "max_kl": 0.1, "verify": FILE}, False),
    ],
    ids=str,
)
def test_which_options_give_each_matrix_its_own_precision(options, budget):
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
def test_the_calibration_text(options, calibration):
    assert ExportOptions(**options).chosen_calibration == calibration


def test_the_command_line_offers_every_method_with_its_summary():
    found = find_methods()
    assert tuple(found) == method_names()
    assert all(found.values())
