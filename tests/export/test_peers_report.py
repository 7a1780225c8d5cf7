"""The comparison with other runtimes: the direction of its ratios, and the content of its tables."""

from __future__ import annotations

import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.bench.peers.results import COLUMNS, TARGETS, judge_side, ratios, verdicts
from tests.bench.peers.shapes import CONFIGS, Facts
from tests.bench.peers.sides import EDGELM, PEERS, all_sides
from tests.bench.peers.tables import COSTS, SPEEDS, markdown
from tests.bench.peers.turns import MEASURES, Settings, job_of

RATES = [key for key in SPEEDS if not key.endswith("_ms")]
TIMES = ["warm_ms", "cold_ms", *COSTS]
SIDES = all_sides(EDGELM)


def measured(advantage: float, rounds: int = 3) -> dict[str, Any]:
    """A report in which edgelm is `advantage` times as good as every peer in everything."""
    base = dict.fromkeys(RATES, 1.0) | dict.fromkeys(TIMES, 1.0)
    ours = dict.fromkeys(RATES, advantage) | dict.fromkeys(TIMES, 1 / advantage)
    sides = {name: ours if side.program == "edgelm" else base for name, side in SIDES.items()}
    return {
        "machine": "a machine",
        "settings": {"threads": 1},
        "parameters": 1,
        "context": 8192,
        "ours": list(EDGELM),
        "notes": {name: side.note for name, side in SIDES.items()},
        "left_out": {},
        "no_reuse": ["optimum"],
        "too_long": [],
        "failed": {"genai": {"warm": "it said why"}},
        "built": {},
        "closeness": {name: {"kl_mean": 0.5} for name in SIDES},
        "judged_tokens": 10,
        "versions": {},
        "rounds": [{"bandwidth_gb_s": 1.0, "busy": 0.0, "sides": sides}] * rounds,
    }


@pytest.mark.parametrize("name", sorted(CONFIGS))
def test_better_results_meet_targets_and_worse_ones_miss_them(name: str) -> None:
    assert all(each.met for each in verdicts(name, measured(20.0), None))
    worse = [each for each in verdicts(name, measured(0.5), None) if "KL" not in each.what]
    assert worse
    assert not any(each.met for each in worse)


def test_every_target_is_judged_somewhere() -> None:
    judged = {each.what for name in CONFIGS for each in verdicts(name, measured(1.0), None)}
    for target in TARGETS:
        assert any(target.peer in what and COLUMNS[target.column].label in what for what in judged)


@given(advantage=st.floats(0.01, 100))
def test_ratios_of_speed_and_of_cost(advantage: float) -> None:
    shape = measured(advantage)
    for name, column in COLUMNS.items():
        wanted = 1 / advantage if name in ("load", "private") else advantage
        assert ratios(shape, "edgelm-int4", "genai", column) == pytest.approx([wanted] * 3)


def test_a_round_without_one_side_has_no_ratio() -> None:
    shape = measured(2.0, rounds=1)
    shape["rounds"][0]["sides"]["genai"] = {}
    assert ratios(shape, "edgelm-int4", "genai", COLUMNS["decode 256"]) == []
    assert not [each for each in verdicts("135m", shape, None) if each.what.startswith("edgelm-int8 beside genai: dec")]


def test_the_side_that_is_judged() -> None:
    shape = measured(1.0)
    assert judge_side(shape, None) == "edgelm-int4"
    assert judge_side(shape, "edgelm-int8") == "edgelm-int8"
    for entry in shape["rounds"]:
        entry["sides"]["edgelm-int4"] = {}
    assert judge_side(shape, None) == "edgelm-int8"


def test_tables_are_complete_and_mark_missing_values() -> None:
    text = markdown({"shapes": {"135m": measured(2.0), "stories": measured(2.0)}}, None)
    for block in re.findall(r"(?:^\|.*\n?)+", text, re.MULTILINE):
        assert len({line.count("|") for line in block.splitlines()}) == 1
    assert "genai, warm: it said why" in text
    assert text.count("| genai |") == 3 * 2  # speeds, costs and ratios of both models


@given(context=st.integers(64, 4096), new_tokens=st.integers(2, 128), side=st.sampled_from([*SIDES.values()]))
def test_no_job_exceeds_the_context_of_a_model(context: int, new_tokens: int, side: Any) -> None:
    facts = Facts(context, 1, 1, True, 1, 1)
    for measure in MEASURES:
        job = job_of(measure, side, "model", facts, Settings(1, new_tokens, 1), 0)
        for length in job.get("lengths", []) if job else []:
            assert length + job["new_tokens"] <= job["context"] <= context


def test_every_peer_has_a_target() -> None:
    unjudged = {"llama-q4_k_m", "llama-q8_0"}  # not four bits
    assert {peer.name for peer in PEERS} - unjudged == {target.peer for target in TARGETS}
