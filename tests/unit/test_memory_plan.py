"""The memory plan: its parts add up, a limit is kept, and error messages contain the numbers."""

from __future__ import annotations

import re
import subprocess
import sys
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

import edgelm
from edgelm.bundle.bundle_folder import open_bundle
from edgelm.bundle.manifest import Matrix
from edgelm.engine import engine
from edgelm.engine.speculation import DRAFT_LENGTHS
from edgelm.errors import EdgelmError
from edgelm.runtime.memory_plan import check_memory, plan_memory

MANIFEST = open_bundle("builtin").manifest
rows = st.integers(1, 64)
contexts = st.integers(1, 100_000)
prefixes = st.integers(0, 10**9)


@given(rows=rows, context=contexts, prefix=prefixes)
def test_the_parts_in_the_text_add_up_to_the_total(rows, context, prefix):
    plan = plan_memory(MANIFEST, rows=rows, context=context, prefix_cache_bytes=prefix)
    *parts, total = (float(number) for number in re.findall(r"[\d.]+", str(plan)))
    assert len(parts) == 7
    assert sum(parts) == pytest.approx(total, abs=0.4)
    assert total == pytest.approx(plan.total / 1e6, abs=0.06)
    assert plan.kv_cache == rows * context * MANIFEST.cache.bytes_per_token()
    # one row of logits for each request, and one for each draft token
    assert plan.logits >= (rows + DRAFT_LENGTHS[0]) * MANIFEST.vocab_size * 4


@given(rows=rows, context=contexts, prefix=prefixes)
def test_each_part_grows_with_its_size(rows, context, prefix):
    plan = plan_memory(MANIFEST, rows=rows, context=context, prefix_cache_bytes=prefix)
    more = [(rows + 1, context, prefix), (rows, context + 1, prefix), (rows, context, prefix + 1)]
    for r, c, p in more:
        assert plan_memory(MANIFEST, rows=r, context=c, prefix_cache_bytes=p).total > plan.total


@pytest.mark.parametrize("bits", [5, 6])
def test_split_codes_count_as_8_bits_as_in_onnxruntime(bits):
    def weights(of: int) -> int:
        manifest = replace(MANIFEST, matrices=(Matrix("embedding", 64, 64, of, 32, method="clip", scale_bits=16),))
        return plan_memory(manifest, rows=1, context=8, prefix_cache_bytes=0).weights

    assert weights(bits) == weights(8) > weights(4)


@given(rows=rows, context=contexts, prefix=prefixes, limit=st.integers(1, 10**6))
def test_a_limit_is_kept_exactly(rows, context, prefix, limit):
    plan = plan_memory(MANIFEST, rows=rows, context=context, prefix_cache_bytes=prefix)
    if plan.total <= limit * 1_000_000:
        check_memory(MANIFEST, limit, rows=rows, context=context, prefix_cache_bytes=prefix)
        return
    with pytest.raises(EdgelmError) as raised:
        check_memory(MANIFEST, limit, rows=rows, context=context, prefix_cache_bytes=prefix)
    assert f"{limit} MB" in str(raised.value)
    assert str(plan) in str(raised.value)
    fits = re.search(r"; (\d+) tokens", str(raised.value))
    if fits:
        smaller = plan_memory(MANIFEST, rows=1, context=int(fits[1]), prefix_cache_bytes=prefix)
        others = plan.total - plan.kv_cache
        assert others + smaller.kv_cache <= limit * 1_000_000


def test_nothing_is_loaded_above_the_limit(monkeypatch):
    monkeypatch.setattr(engine, "open_runner", lambda *_, **__: pytest.fail("loaded"))
    with pytest.raises(EdgelmError, match="90 MB"):
        edgelm.load("builtin", memory_limit_mb=90)


USE = """
import sys, threading, edgelm
with edgelm.load("builtin", max_batch=4, prefix_cache_mb=4, memory_limit_mb=int(sys.argv[1])) as lm:
    long = list(range(2, 2 + lm.context // 2))
    def ask():
        lm.generate(tokens=long, max_tokens=10_000, ignore_eos=True, temperature=0)
    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads: thread.start()
    for thread in threads: thread.join()
print(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only Linux reports the peak of a process")
def test_the_plan_covers_the_peak_of_a_busy_process():
    plan = plan_memory(MANIFEST, rows=5, context=MANIFEST.context, prefix_cache_bytes=4_000_000)
    limit = -(-plan.total // 1_000_000)
    done = subprocess.run([sys.executable, "-c", USE, str(limit)], capture_output=True, text=True, check=True)
    peak = 1024 * int(done.stdout)
    assert 0.6 * plan.total < peak <= 1.1 * plan.total


def test_the_command_reports_the_limit_in_one_line(capsys):
    from edgelm.cli import main

    assert main(["generate", "builtin", "hello", "--memory-limit-mb", "80"]) == 1
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "80 MB" in said
