"""LoRA adapters: adapted weights against plain sums, and what is refused."""

from __future__ import annotations

import re
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tiny import TinyLlama, save_tensors, write_json

pytest.importorskip("safetensors", reason="needs pip install 'edgelm[export]'")

from edgelm_export.checkpoint import Checkpoint, open_checkpoint
from edgelm_export.checkpoint.lora import AdaptedWeights, Adapter, open_adapter
from edgelm_export.checkpoint.lora_patterns import first_matches

from edgelm.errors import CheckpointError

BASE = TinyLlama(layers=1, tied=False)
NAMES = set(BASE.tensors())
QUERY = "model.layers.0.self_attn.q_proj"
DOWN = "model.layers.0.mlp.down_proj"
EMBEDDING = "model.embed_tokens"
OPTIONS = {"peft_type": "LORA", "r": 4, "lora_alpha": 6, "bias": "none", "task_type": "CAUSAL_LM"}


def factors(module: str, rank: int, seed: int = 0) -> dict[str, np.ndarray]:
    """Both factors of a module of `BASE`, named as peft names them."""
    rows, columns = BASE.tensors()[f"{module}.weight"].shape
    generator = np.random.default_rng(seed)
    names, sizes = ("lora_A.weight", "lora_B.weight"), ((rank, columns), (rows, rank))
    if module == EMBEDDING:
        names, sizes = ("lora_embedding_A", "lora_embedding_B"), ((rank, rows), (columns, rank))
    return {
        f"base_model.model.{module}.{name}": generator.normal(size=size).astype(np.float32)
        for name, size in zip(names, sizes, strict=True)
    }


def save(path: Path, tensors: Mapping[str, np.ndarray], dtype: str = "float32", **options: Any) -> Path:
    path.mkdir(parents=True, exist_ok=True)
    write_json(path / "adapter_config.json", {**OPTIONS, **options})
    save_tensors(path, dict(tensors), dtype)
    (path / "model.safetensors").replace(path / "adapter_model.safetensors")
    return path


def opened(path: Path, tied: bool | None = False) -> Adapter:
    return open_adapter(path, {} if tied is None else {"tie_word_embeddings": tied})


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return open_checkpoint(BASE.write(tmp_path_factory.mktemp("base") / "model"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory that each example overwrites."""
    return tmp_path_factory.mktemp("adapter")


@given(
    module=st.sampled_from([QUERY, DOWN, EMBEDDING, "lm_head"]),
    rank=st.integers(1, 9),
    alpha=st.one_of(st.integers(1, 64), st.floats(0.1, 8)),
    stabilized=st.booleans(),
    dtype=st.sampled_from(["float32", "bfloat16", "float16"]),
    data=st.data(),
)
def test_adapted_weights_equal_plain_sums(
    base: Checkpoint,
    folder: Path,
    module: str,
    rank: int,
    alpha: float,
    stabilized: bool,
    dtype: str,
    data: st.DataObject,
) -> None:
    stored = factors(module, rank)
    adapter = opened(save(folder, stored, dtype, r=rank, lora_alpha=alpha, use_rslora=stabilized))
    adapter.check(NAMES)
    name = f"{module}.weight"
    weight = BASE.tensors()[name]
    before = weight.copy()
    found = adapter.apply(name, weight)
    assert found.dtype == np.float32
    a, b = (adapter.weights.tensor(key, value.shape).astype(np.float64) for key, value in stored.items())
    scale = alpha / np.sqrt(rank) if stabilized else alpha / rank
    for i, j in data.draw(st.lists(st.tuples(*(st.integers(0, n - 1) for n in weight.shape)), min_size=1, max_size=9)):
        if module == EMBEDDING:
            change = sum(b[j, k] * a[k, i] for k in range(rank))
        else:
            change = sum(b[i, k] * a[k, j] for k in range(rank))
        assert found[i, j] == pytest.approx(weight[i, j] + scale * change, rel=1e-5, abs=1e-4)
    assert np.array_equal(weight, before)

    start = data.draw(st.integers(0, len(weight) - 1))
    stop = data.draw(st.integers(start + 1, len(weight)))
    rows = slice(start, stop)
    np.testing.assert_allclose(adapter.apply(name, weight[rows], rows), found[rows], rtol=1e-6, atol=1e-5)
    adapted = AdaptedWeights(base, adapter)
    np.testing.assert_allclose(adapted.tensor(name, weight.shape, rows), found[rows], rtol=1e-6, atol=1e-5)
    np.testing.assert_array_equal(adapted.tensor(name, weight.shape), found)


def test_other_tensors_are_unchanged(base: Checkpoint, folder: Path) -> None:
    adapter = opened(save(folder, factors(QUERY, 4)))
    assert adapter.changed_tensors == [f"{QUERY}.weight"]
    for name, weight in BASE.tensors().items():
        if name != f"{QUERY}.weight":
            assert adapter.apply(name, weight) is weight
            np.testing.assert_array_equal(AdaptedWeights(base, adapter).tensor(name, weight.shape), weight)


def test_patterns_set_rank_and_alpha_of_a_module(folder: Path) -> None:
    """A pattern is the end of a name or a regular expression; the first match counts."""
    stored = {**factors(QUERY, 2), **factors(DOWN, 4)}
    options = {
        "rank_pattern": {"q_proj": 2},
        "alpha_pattern": {r"proj": 99, r"layers\.\d+\.mlp\..*": 12, "down_proj": 1},
    }
    adapter = opened(save(folder, stored, **options))
    for module, scale in ((QUERY, 6 / 2), (DOWN, 12 / 4)):
        weight = BASE.tensors()[f"{module}.weight"]
        a, b = (stored[f"base_model.model.{module}.lora_{half}.weight"] for half in "AB")
        np.testing.assert_allclose(adapter.apply(f"{module}.weight", weight), weight + scale * (b @ a), atol=1e-4)


@given(
    patterns=st.lists(
        st.tuples(
            st.text("ab.", min_size=1, max_size=4), st.sampled_from(["", "", r"\.", "1+", ".*", "[ab]", "(a|b)"])
        ).map("".join),
        min_size=1,
        max_size=4,
    ),
    names=st.lists(st.text("ab.1\n", min_size=1, max_size=8), min_size=1, max_size=4),
)
@example(patterns=["a", "b.a"], names=["ba", "b.a", "a", "bb.a", "a\n"])
@settings(max_examples=60, deadline=None)
def test_patterns_match_as_peft_matches_them(patterns: list[str], names: list[str]) -> None:
    expected = [
        next((i for i, each in enumerate(patterns) if re.fullmatch(rf"(.*\.)?({each})", name)), None) for name in names
    ]
    assert first_matches(patterns, names) == expected


@pytest.mark.parametrize("option", ["rank_pattern", "alpha_pattern"])
@pytest.mark.parametrize(
    "pattern",
    ["(_|[a-z]+)+$x", "((.*)*)*y", "(.|_)*(.|_)*(.|_)*(.|_)*(.|_)*(.|_)*(.|_)*9", "q_proj_" + "(a|aa)" * 40 + "b"],
)
def test_a_pattern_of_exponential_time_is_refused(
    folder: Path, monkeypatch: pytest.MonkeyPatch, option: str, pattern: str
) -> None:
    monkeypatch.setattr("edgelm_export.checkpoint.lora_patterns.MATCH_TIMEOUT_S", 1.0)
    module = f"{QUERY}_{'a' * 60}"
    stored = {key.replace(QUERY, module): value for key, value in factors(QUERY, 4).items()}
    begun = time.monotonic()
    told = refused(save(folder, stored, **{option: {pattern: 4}}))
    assert f"{option}: the patterns take longer than 1 s" in told
    assert "q_proj" in told
    assert time.monotonic() - begun < 20


@pytest.mark.parametrize("option", ["target_modules", "exclude_modules", "layers_pattern"])
def test_expressions_of_target_modules_are_not_matched(folder: Path, option: str) -> None:
    """The tensors show which modules were adapted."""
    opened(save(folder, factors(QUERY, 4), **{option: "(a+)+$" * 20 + "("})).check(NAMES)


def test_a_module_saved_whole_replaces_that_of_the_base(folder: Path) -> None:
    head, norm = (BASE.tensors()[name] * 3 for name in ("lm_head.weight", "model.norm.weight"))
    stored = {"base_model.model.lm_head.weight": head, "base_model.model.model.norm.weight": norm, **factors(QUERY, 4)}
    adapter = opened(save(folder, stored, modules_to_save=["lm_head", "norm"]))
    adapter.check(NAMES)
    np.testing.assert_array_equal(adapter.apply("lm_head.weight", head / 3), head)
    np.testing.assert_array_equal(adapter.apply("lm_head.weight", head[7:9], slice(7, 9)), head[7:9])
    np.testing.assert_array_equal(adapter.apply("model.norm.weight", norm / 3), norm)


def test_an_embedding_saved_with_its_factors_is_replaced_and_adapted(folder: Path) -> None:
    """peft saves an adapted embedding together with its base."""
    moved = BASE.tensors()[f"{EMBEDDING}.weight"] + 1
    stored = {f"base_model.model.{EMBEDDING}.base_layer.weight": moved, **factors(EMBEDDING, 4)}
    found = opened(save(folder, stored)).apply(f"{EMBEDDING}.weight", moved - 1)
    a, b = (stored[f"base_model.model.{EMBEDDING}.lora_embedding_{half}"] for half in "AB")
    np.testing.assert_allclose(found, moved + 1.5 * (b @ a).T, atol=1e-4)


@pytest.mark.parametrize("tied", [True, None])
def test_a_tied_matrix_must_change_as_embedding_and_head(folder: Path, tied: bool | None) -> None:
    names = NAMES - {"lm_head.weight"}
    weight = BASE.tensors()[f"{EMBEDDING}.weight"]
    both = {f"base_model.model.{module}.weight": weight for module in (EMBEDDING, "lm_head")}
    saved = {"modules_to_save": ["embed_tokens", "lm_head"]}
    opened(save(folder, both, **saved), tied).check(names)
    opened(save(folder, factors(EMBEDDING, 4), ensure_weight_tying=True), tied).check(names)
    opened(save(folder, factors(QUERY, 4)), tied).check(names)
    other = {**both, "base_model.model.lm_head.weight": weight + 1}
    for stored, options in (
        (other, saved),
        ({**both, **factors(EMBEDDING, 4)}, saved),
        (factors(EMBEDDING, 4), {}),
        (factors("lm_head", 4), {}),
        (factors("lm_head", 4), {"ensure_weight_tying": True}),
    ):
        adapter = opened(save(folder, stored, **options), tied)
        with pytest.raises(CheckpointError, match=r"embedding.*lm_head.weight"):
            adapter.check(names)


# --- refusals: one line that says what was wrong ---


def refused(path: Path) -> str:
    with pytest.raises(CheckpointError) as refusal:
        opened(path).check(NAMES)
    assert "\n" not in str(refusal.value)
    return str(refusal.value)


@pytest.mark.parametrize(
    "option",
    [
        {"use_dora": True},
        {"target_parameters": ["mlp.experts.gate_up_proj"]},
        {"layer_replication": [[0, 1], [0, 1]]},
        {"trainable_token_indices": [1, 2]},
        {"fan_in_fan_out": True},
        {"lora_bias": True},
        {"use_mora": True},
        {"kasa_config": {"beta": 0.1}},
        {"an_option_of_tomorrow": 1},
    ],
    ids=lambda option: next(iter(option)),
)
def test_options_that_change_the_arithmetic_are_named(folder: Path, option: dict[str, Any]) -> None:
    text = refused(save(folder, factors(QUERY, 4), **option))
    assert next(iter(option)) in text


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"peft_type": "IA3"}, "peft_type is IA3"),
        ({"bias": "lora_only"}, "bias 'lora_only'"),
        ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights 'pissa_niter_4'"),
        ({"r": 0}, "r must be a positive number, got 0"),
        ({"r": 4.0}, "r must be a positive number, got 4.0"),
        ({"r": 8}, "rank 8"),
        ({"lora_alpha": None}, "lora_alpha must be a positive number, got None"),
        ({"lora_alpha": float("inf")}, "lora_alpha must be a positive number, got inf"),
        ({"rank_pattern": {"q_proj": 5}}, "rank 5"),
        ({"rank_pattern": {"q_proj": "5"}}, "rank_pattern"),
        ({"alpha_pattern": {"(": 5}}, "'('"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"modules_to_save": "lm_head"}, "modules_to_save"),
    ],
)
def test_invalid_options_are_refused(folder: Path, options: dict[str, Any], reason: str) -> None:
    assert reason in refused(save(folder, factors(QUERY, 4), **options))


def test_options_at_their_defaults_are_allowed(folder: Path) -> None:
    options = {
        "use_dora": False,
        "target_parameters": None,
        "layer_replication": None,
        "rank_pattern": {},
        "loftq_config": {},
        "fan_in_fan_out": False,
        "megatron_core": "megatron.core",
        "qalora_group_size": 16,
        "init_lora_weights": "gaussian",
        "lora_dropout": 0.1,
        "target_modules": ["q_proj"],
    }
    opened(save(folder, factors(QUERY, 4), **options)).check(NAMES)


def test_an_adapter_for_another_base_is_refused(base: Checkpoint, folder: Path) -> None:
    stored = {key.replace("layers.0", "layers.7"): value for key, value in factors(QUERY, 4).items()}
    text = refused(save(folder, {**stored, **factors(DOWN, 4)}))
    assert "model.layers.7.self_attn.q_proj.weight" in text
    assert "1 of 2 tensors" in text

    wide = {key: np.tile(value, (1, 2) if "lora_A" in key else 1) for key, value in factors(QUERY, 4).items()}
    adapter = opened(save(folder, wide))
    adapter.check(NAMES)
    name, shape = f"{QUERY}.weight", (64, 64)
    reason = r"model\.layers\.0\.self_attn\.q_proj\.weight.*\[64, 128\].*\[64, 64\]"
    for rows in (None, slice(0, 64)):
        with pytest.raises(CheckpointError, match=reason):
            adapter.apply(name, BASE.tensors()[name], rows)
        with pytest.raises(CheckpointError, match=reason):
            AdaptedWeights(base, adapter).tensor(name, shape, rows)
    tall = {f"base_model.model.{EMBEDDING}.weight": np.ones((340, 64), np.float32)}
    with pytest.raises(CheckpointError, match=r"\[340, 64\].*\[331, 64\]"):
        AdaptedWeights(base, opened(save(folder, tall))).tensor(f"{EMBEDDING}.weight", (331, 64), slice(0, 10))
    with pytest.raises(CheckpointError, match=r"\[340, 64\].*\[331, 64\]"):
        opened(folder).apply(f"{EMBEDDING}.weight", BASE.tensors()[f"{EMBEDDING}.weight"])


def test_half_an_adapter_is_refused(folder: Path) -> None:
    for half in ("A", "B"):
        only = {key: value for key, value in factors(QUERY, 4).items() if f"lora_{half}" in key}
        assert f"{QUERY} needs both LoRA factors, A and B; found {half}" in refused(save(folder, only))


def test_nan_and_infinity_are_refused(folder: Path) -> None:
    for value in (np.nan, np.inf):
        stored = factors(QUERY, 4)
        next(iter(stored.values()))[1, 2] = value
        adapter = opened(save(folder, stored))
        with pytest.raises(CheckpointError, match=r"lora_A\.weight.*NaN"):
            adapter.apply(f"{QUERY}.weight", BASE.tensors()[f"{QUERY}.weight"])


def test_tensors_of_something_else_are_refused(folder: Path) -> None:
    vector = {f"base_model.model.{QUERY}.lora_magnitude_vector": np.ones(64, np.float32)}
    text = refused(save(folder, {**factors(QUERY, 4), **vector}))
    assert "lora_magnitude_vector" in text
    assert "empty" in refused(save(folder, {}))


def test_missing_and_damaged_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="nowhere"):
        opened(tmp_path / "nowhere")
    assert "adapter_config.json" in refused(tmp_path)
    write_json(tmp_path / "adapter_config.json", OPTIONS)
    assert "adapter_model.safetensors" in refused(tmp_path)
    (tmp_path / "adapter_model.bin").write_bytes(b"")
    assert "pickled" in refused(tmp_path)
    whole = (save(tmp_path, factors(QUERY, 4)) / "adapter_model.safetensors").read_bytes()
    (tmp_path / "adapter_model.safetensors").write_bytes(whole[:-9])
    assert "adapter_model.safetensors" in refused(tmp_path)
    (tmp_path / "adapter_config.json").write_text("{")
    assert "adapter_config.json cannot be read" in refused(tmp_path)
