"""The output of `edgelm export`: the dry run, the tables, one line for an error."""

from __future__ import annotations

import json
import re

import pytest

pytest.importorskip("onnx", reason="needs pip install 'edgelm[export]'")

from tiny import TEXT

from edgelm.cli.export import parse_byte_count
from edgelm.system.progress_bar import format_bar


@pytest.fixture
def text(tmp_path):
    file = tmp_path / "text.txt"
    file.write_text("\n<|endoftext|>\n".join(TEXT * 12), encoding="utf-8")
    return file


def test_a_dry_run_prints_the_plan_and_writes_nothing(tiny_checkpoint, tmp_path, run):
    checkpoint = tiny_checkpoint(layers=3, tied=False)
    code, out, err = run("export", checkpoint, "--dry-run")
    assert (code, err) == (0, "")
    lines = out.splitlines()
    assert lines[0].split() == ["matrix", "shape", "bits", "block", "zeros", "method", "MB"]
    assert [line.split()[0] for line in lines[1:7]] == [
        "embedding",
        *(f"layer.0.{part}" for part in ("qkv", "output", "gate_up", "down")),
        "head",
    ]
    assert all(" .. 2 " in line for line in lines[2:6])  # equal layers share a line
    assert re.search(r"^[\d.]+ bits .* [\d.]+ MB ", lines[-1])
    code, out, _ = run("export", checkpoint, "--dry-run", "--json", "--quant", "int8")
    facts = json.loads(out)
    assert (code, len(facts["matrices"]), facts["kl"]) == (0, 1 + 3 * 4 + 1, None)
    assert {matrix["bits"] for matrix in facts["matrices"]} == {8}
    assert facts["bytes"] > sum(matrix["bytes"] for matrix in facts["matrices"])
    assert list(tmp_path.iterdir()) == []


def test_measurements_are_printed(tiny_checkpoint, tmp_path, text, run):
    options = ["--verify", text, "--vocab", text, "--vocab-size", 300]
    code, out, _ = run("export", tiny_checkpoint(), tmp_path / "out", *options)
    assert code == 0
    lines = out.splitlines()
    assert re.search(r"[\d.]+ bits", lines[0])
    assert lines[1].startswith("vocabulary: 300 of 331 tokens, ")
    assert [line.split()[0] for line in lines[-5:]] == ["on", "perplexity", "KL", "KL", "same"]
    code, out, _ = run("export", tiny_checkpoint(), tmp_path / "out", *options, "--force", "--json")
    facts = json.loads(out)
    assert facts["quality"]["text"] == "text.txt"
    assert facts["vocabulary"]["tokens"] == 300
    code, out, _ = run("info", tmp_path / "out")
    assert "300 of 331 tokens" in out
    assert re.search(r"same top token.*? [\d.]+ %", out, re.MULTILINE)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "OUT"),
        (["{out}", "--method", "gptq", "--fast"], "--fast"),
        (["{out}", "--calibrate", "self", "--fast"], "not allowed with argument --calibrate"),
        (["{out}", "--calibrate", "none.txt"], "none.txt cannot be read: No such file"),
        (["{out}", "--dry-run", "--via", "optimum"], "--dry-run does not go with --via optimum"),
        (["{out}", "--adapter", "none/"], "none"),
        (["{out}", "--max-bytes", "0"], "'0'"),
        (["{out}", "--max-bytes", "much"], "'much'"),
    ],
    ids=str,
)
def test_an_error_is_one_line_and_leaves_nothing(arguments, message, tiny_checkpoint, tmp_path, capsys):
    from edgelm.cli import main

    filled = [argument.format(out=tmp_path / "out") for argument in arguments]
    try:
        code = main(["export", str(tiny_checkpoint()), *filled])
    except SystemExit as error:  # argparse's own
        code = error.code
    printed = capsys.readouterr()
    assert code not in (0, None)
    assert printed.out == ""
    assert message in printed.err
    lines = [line for line in printed.err.splitlines() if line.startswith("edgelm")]
    assert len(lines) == 1, printed.err  # argparse puts the usage before it
    assert list(tmp_path.iterdir()) == []


def test_sizes_are_read_with_their_units():
    sizes = {"1": 1, "150M": 150_000_000, "1.5g": 1_500_000_000, "20k": 20_000}
    assert {text: parse_byte_count(text) for text in sizes} == sizes


def test_the_bar_shows_bytes_and_the_time_left():
    assert format_bar("quantizing", 5, 10, 2.0) == "quantizing 5/10 [###############...............] 2 s left"
    assert format_bar("quantizing", 0, 10**8, 0.5) == "quantizing 0.0/100.0 MB [..............................]"
    assert format_bar("quantizing", 75 * 10**6, 10**8, 30.0).endswith("] 10 s left")
