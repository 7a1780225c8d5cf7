"""Reads adapter_config.json: rank and scale of each module. Options that would change the arithmetic are refused.

Hu et al. 2021, "LoRA: Low-Rank Adaptation of Large Language Models", section 4.1: W + (alpha / r) B A; with
`use_rslora` W + (alpha / sqrt(r)) B A (Kalajdzievski 2023, "A Rank Stabilization Scaling Factor for Fine-Tuning with
LoRA", section 3). Options are those of PEFT 0.21.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from edgelm.errors import CheckpointError

from . import read_json
from .lora_patterns import PatternError, first_matches

CONFIG: Final = "adapter_config.json"

SUPPORTED_OPTIONS: Final = {
    "alpha_pattern",
    "bias",
    "ensure_weight_tying",
    "init_lora_weights",
    "lora_alpha",
    "modules_to_save",
    "peft_type",
    "r",
    "rank_pattern",
    "use_rslora",
}
IGNORED_OPTIONS: Final = {
    # origin and purpose
    *("auto_mapping", "base_model_name_or_path", "inference_mode", "peft_version", "revision", "task_type"),
    # which modules were adapted: the tensors show it
    *("exclude_modules", "layers_pattern", "layers_to_transform", "target_modules"),
    # training, initial values, and parameters of options that are refused themselves
    *("corda_config", "eva_config", "lora_dropout", "lora_ga_config", "loftq_config", "megatron_core"),
    *("qalora_group_size", "runtime_config"),
}
PLAIN_INITIALIZATIONS: Final = (True, False, "gaussian", "eva", "orthogonal")
"""Initializations of an adapter that do not change the base."""


@dataclass(frozen=True, slots=True)
class AdapterOptions:
    """The options of an adapter that can be merged. The modules `modules_to_save` are stored whole."""

    file: Path
    r: int
    lora_alpha: float
    rank_pattern: Mapping[str, int]
    alpha_pattern: Mapping[str, float]
    use_rslora: bool
    modules_to_save: tuple[str, ...]
    ensure_weight_tying: bool

    def ranks_and_scales(self, modules: Sequence[str]) -> dict[str, tuple[int, float]]:
        """Return the rank and scale of each module's factors.

        Raises `CheckpointError` if a pattern is invalid or matching takes too long.
        """
        ranks = self._matching("rank_pattern", self.rank_pattern, self.r, modules)
        alphas = self._matching("alpha_pattern", self.alpha_pattern, self.lora_alpha, modules)
        found = {}
        for module, rank, alpha in zip(modules, map(int, ranks), alphas, strict=True):
            found[module] = (rank, alpha / (rank**0.5 if self.use_rslora else rank))
        return found

    def _matching(
        self, option: str, patterns: Mapping[str, float], default: float, modules: Sequence[str]
    ) -> list[float]:
        """Return for each module the value of the first pattern that matches its name or the end of it."""
        values = list(patterns.values())
        try:
            found = first_matches(list(patterns), modules)
        except PatternError as error:
            raise CheckpointError(
                f"{self.file}: {option}: {error}; use names of modules instead, such as q_proj"
            ) from error
        return [default if i is None else values[i] for i in found]


def read_options(folder: Path) -> AdapterOptions:
    """Read an adapter's options.

    Raises `CheckpointError` if the file is missing or an option is not supported.
    """
    file = folder / CONFIG
    if not file.is_file():
        raise CheckpointError(f"{folder} has no {CONFIG}: it is not an adapter of PEFT's format")
    options = read_json(file)
    _refuse_variants(file, options)
    for name, whole in (("r", True), ("lora_alpha", False)):
        if not _is_positive(options.get(name), whole):
            raise CheckpointError(f"{file}: {name} must be a positive number, got {options.get(name)!r}")
    for name, whole in (("rank_pattern", True), ("alpha_pattern", False)):
        patterns = options.get(name) or {}
        if not isinstance(patterns, dict) or not all(_is_positive(value, whole) for value in patterns.values()):
            raise CheckpointError(f"{file}: {name} must map names to positive numbers, got {patterns!r}")
    modules = options.get("modules_to_save") or []
    if not isinstance(modules, list) or not all(isinstance(module, str) for module in modules):
        raise CheckpointError(f"{file}: modules_to_save must be a list of names, got {modules!r}")
    return AdapterOptions(
        file=file,
        r=options["r"],
        lora_alpha=options["lora_alpha"],
        rank_pattern=options.get("rank_pattern") or {},
        alpha_pattern=options.get("alpha_pattern") or {},
        use_rslora=bool(options.get("use_rslora")),
        modules_to_save=tuple(modules),
        ensure_weight_tying=bool(options.get("ensure_weight_tying")),
    )


def _refuse_variants(file: Path, options: Mapping[str, Any]) -> None:
    """Raise `CheckpointError` for an option that would not be merged as PEFT does."""
    if options.get("peft_type") != "LORA":
        raise CheckpointError(f"{file}: peft_type is {options.get('peft_type')}; only LORA can be merged")
    start = options.get("init_lora_weights", True)
    if start not in PLAIN_INITIALIZATIONS:
        raise CheckpointError(
            f"{file}: init_lora_weights {start!r} changes the base; save the adapter converted to plain LoRA"
            " (path_initial_model_for_weight_conversion of peft's save_pretrained)"
        )
    if options.get("bias", "none") != "none":
        raise CheckpointError(f"{file}: bias {options['bias']!r} is not supported; only 'none' can be merged")
    for name in sorted(set(options) - SUPPORTED_OPTIONS - IGNORED_OPTIONS):
        if options[name] not in (None, False, [], {}, ""):
            raise CheckpointError(f"{file}: {name} is not supported; only plain LoRA can be merged")


def _is_positive(value: object, whole: bool) -> bool:
    if isinstance(value, bool) or not isinstance(value, int if whole else (int, float)):
        return False
    return 0 < value < float("inf")
