"""config.json of well-known checkpoints: every key is read, in the spellings of transformers 4 and 5."""

from __future__ import annotations

import pytest

pytest.importorskip("onnx", reason="needs pip install 'edgelm[export]'")

from edgelm_export.architectures import find_architecture
from published import PUBLISHED


def as_transformers_5_saves_it(config):
    """Rope options in rope_parameters, those of Gemma 3 by kind of layer; dtype for torch_dtype."""
    kept = {name: value for name, value in config.items() if name not in ("rope_theta", "rope_scaling", "torch_dtype")}
    kept["dtype"] = config["torch_dtype"]
    options = {"rope_theta": config["rope_theta"], "rope_type": "default", **(config.get("rope_scaling") or {})}
    if "type" in options:
        options["rope_type"] = options["type"]
    if config["model_type"] == "phi3":
        options["partial_rotary_factor"] = config.get("partial_rotary_factor", 1.0)
        if options["rope_type"] == "longrope":
            options["original_max_position_embeddings"] = config["original_max_position_embeddings"]
    if config["model_type"] == "gemma3_text":
        local = {"rope_theta": kept.pop("rope_local_base_freq"), "rope_type": "default"}
        options = {"full_attention": options, "sliding_attention": local}
    return {**kept, "rope_parameters": options}


@pytest.mark.parametrize(("config", "parameters"), PUBLISHED.values(), ids=PUBLISHED)
def test_a_published_configuration_is_read(config, parameters):
    family = find_architecture(config)
    decoder = family.read_config(config)
    assert decoder.parameters == parameters
    assert family.read_config(as_transformers_5_saves_it(config)) == decoder
