"""Checks edgelm/catalogue.toml: `python -m tests.bench.catalogue`; by hand.

Without options the sizes of every variant are computed from the models' shapes and compared. `--write` puts them right.
`--online` asks the hub, which needs a network: does the model exist, has it this licence and these shapes; with
`--write` too the newest commit becomes the one that is fetched.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path

from edgelm_export.architectures import find_architecture

from edgelm.bundle.catalogue import CATALOGUE_FILE, CatalogueModel, ModelVariant, load_catalogue
from edgelm.runtime.memory_plan import PREFIX_CACHE_MB, PROGRAM_BYTES

sys.path.insert(0, str(Path(__file__).parents[1] / "support"))
from published import CATALOGUE, PUBLISHED

TOKENS = 2048
"""Of the request that `memory_mb` counts."""

BITS = {"int4": (4.5, 5.5), "int5": (5.5, 5.5), "int8": (8.5, 8.5)}
"""Bits a weight with scales: of the matrices in the layers, of embedding and head."""

SHAPES = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
LICENCES = {"Llama 3.2 Community": "llama3.2", "Gemma Terms of Use": "gemma"}
"""What the hub calls those that are not SPDX identifiers."""


def sized(model: CatalogueModel, variant: ModelVariant) -> tuple[int, int]:
    """Return a variant's size on disk and what it takes in memory, both in 10^6 bytes."""
    config, parameters = PUBLISHED[CATALOGUE[model.name]]
    decoder = find_architecture(config).read_config(config)
    outside = decoder.vocab_size * decoder.hidden_size * (1 if decoder.has_tied_head else 2)
    inner, outer = BITS[variant.quant]
    weights = ((parameters - outside) * inner + outside * outer) / 8
    keys = 2 * TOKENS * decoder.cache.bytes_per_token()  # of the request, and of one being scored
    return round(weights / 1e6), round((PROGRAM_BYTES + 1.05 * weights + keys) / 1e6) + PREFIX_CACHE_MB


def online(model: CatalogueModel) -> tuple[list[str], str]:
    """Return what differs from the hub, and its newest commit."""
    from huggingface_hub import HfApi, hf_hub_download

    info = HfApi().model_info(model.hub, revision=model.revision)
    faults = []
    licence = (info.card_data or {}).get("license", "")
    name = (info.card_data or {}).get("license_name", "")
    expected = LICENCES.get(model.licence, model.licence).lower()
    if expected not in (str(licence).lower(), str(name).lower()):
        faults.append(f"licence: {licence} {name}, not {model.licence}")
    if bool(info.gated) != model.gated:
        faults.append(f"gated: {info.gated}")
    config = json.loads(Path(hf_hub_download(model.hub, "config.json", revision=info.sha)).read_text("utf-8"))
    recorded = PUBLISHED[CATALOGUE[model.name]][0]
    faults += [f"{key}: {config[key]}" for key in SHAPES if config.get(key) != recorded.get(key)]
    return faults, str(info.sha)


def main() -> int:
    """Check, and write what can be put right."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--online", action="store_true")
    parser.add_argument("--write", action="store_true")
    args = parser.parse_args()
    text, faults = CATALOGUE_FILE.read_text("utf-8"), 0
    for model in load_catalogue().values():
        start = text.index(f'["{model.name}"]')
        stop = text.find("\n\n", start) + 1 or len(text)
        section = text[start:stop]
        for variant in model.variants:
            size, memory = sized(model, variant)
            if (variant.mb, variant.memory_mb) != (size, memory):
                faults += not args.write
                print(
                    f"{model.name} {variant.quant}: {size} MB, {memory} MB of memory;"
                    f" the file has {variant.mb}, {variant.memory_mb}"
                )
                pattern = rf'(quant = "{variant.quant}", mb = )\d+(, memory_mb = )\d+'
                section = re.sub(pattern, rf"\g<1>{size}\g<2>{memory}", section)
        if args.online:
            found, commit = online(model)
            faults += len(found)
            for fault in found:
                print(f"{model.name}: {fault}")
            if args.write:
                section = re.sub(r"revision = .*\n", "", section)
                section = section.replace("licence =", f'revision = "{commit}"\nlicence =')
        text = text[:start] + section + text[stop:]
    if args.write:
        CATALOGUE_FILE.write_text(text, "utf-8")
    print(f"{faults} faults" if faults else "the catalogue is right")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
