"""Thread settings: the best one is chosen, stored, and used by later runs if it is still valid."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgelm.bench.autotune import TIE_RATIO, TuningResult, choose_fastest
from edgelm.bundle.bundle_folder import open_bundle
from edgelm.cli import main
from edgelm.runtime.ort import cache_key, resolve_thread_settings
from edgelm.runtime.threads import ThreadSettings, count_cores, default_threads, load_tuning, save_tuning
from edgelm.system.board_cache import BoardCache

settings = st.builds(ThreadSettings, st.integers(1, 8), st.booleans())
trials = st.lists(st.builds(TuningResult, settings, st.floats(0.1, 1e4), st.just(1.0)), min_size=1, max_size=12)


@given(trials)
def test_the_smallest_of_the_settings_that_tie_with_the_best_is_chosen(found):
    chosen = choose_fastest(tuple(found))
    best = max(trial.decode_tok_s for trial in found)
    good = {trial.tuning for trial in found if trial.decode_tok_s * TIE_RATIO >= best}
    assert chosen in good
    assert all((chosen.threads, chosen.spin) <= (other.threads, other.spin) for other in good)


@pytest.fixture
def cache(tmp_path):
    return BoardCache(tmp_path)


@pytest.mark.parametrize("spin", [True, False])
def test_saved_settings_are_loaded(cache, bundle, spin):
    opened = open_bundle(bundle)
    key = cache_key(opened, "tuning")
    assert load_tuning(cache, key) is None
    assert resolve_thread_settings(opened, None, cache) == ThreadSettings(default_threads())
    assert save_tuning(cache, key, ThreadSettings(1, not spin), "a")
    assert save_tuning(cache, key, ThreadSettings(1, spin), "a"), "the newer one counts"
    assert resolve_thread_settings(opened, None, cache) == ThreadSettings(1, spin)
    assert resolve_thread_settings(opened, 3, cache) == ThreadSettings(3), "a given number takes precedence"
    assert resolve_thread_settings(opened, None, None) == ThreadSettings(default_threads())


@pytest.mark.parametrize("metadata", [{"threads": count_cores() + 1, "spin": True}, {"threads": "2", "spin": True}, {}])
def test_invalid_settings_are_ignored(cache, bundle, metadata):
    key = cache_key(open_bundle(bundle), "tuning")
    cache.make(key, 0, lambda _folder: metadata)
    assert load_tuning(cache, key) is None


def test_the_command_tries_every_setting_and_keeps_one(bundle, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("EDGELM_CACHE_DIR", str(tmp_path / "cache"))
    assert main(["bench", str(bundle), "--tune", "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["kept"]
    tried = {(trial["threads"], trial["spin"]) for trial in said["trials"]}
    assert tried == {(n, s) for n in range(1, min(count_cores(), 8) + 1) for s in (True, False)} - {(1, False)}
    assert all(trial["decode_tok_s"] > 0 and trial["prefill_tok_s"] > 0 for trial in said["trials"])
    assert resolve_thread_settings(open_bundle(bundle), None, BoardCache.default()) == ThreadSettings(**said["best"])
    assert main(["bench", str(bundle), "--tune"]) == 0
    table = capsys.readouterr().out
    assert table.count("<- best") == 1
    assert str(tmp_path / "cache") in table


@pytest.mark.parametrize("flag", [["--no-cache"], ["--threads", "2"]])
def test_tuning_needs_the_cache_and_no_given_threads(bundle, capsys, flag):
    assert main(["bench", str(bundle), "--tune", *flag]) == 2
    err = capsys.readouterr().err
    assert "--threads" in err
    assert "--no-cache" in err
