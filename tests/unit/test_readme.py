"""README, commands and Makefile agree: every command in README can be run."""

from __future__ import annotations

import re
import shlex
import sys
from pathlib import Path

import pytest

from edgelm.cli import _parse
from edgelm.errors import UsageError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def code_blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def commands(program: str) -> list[str]:
    lines = [line for block in code_blocks("sh") for line in block.splitlines()]
    return [line for line in lines if line.split(" ", 1)[0] == program]


def other_commands() -> list[str]:
    """Return the commands that begin with `edgelm` in every other README."""
    found = []
    for file in [*ROOT.glob("*/README.md"), *ROOT.glob("*/*/README.md")]:
        for block in re.findall(r"```(?:sh)?\n(.*?)```", file.read_text(encoding="utf-8"), re.DOTALL):
            found += [line for line in block.splitlines() if re.match(r"edgelm [a-z]+ [^:]", line)]
    return found


@pytest.mark.parametrize("line", [*commands("edgelm"), *other_commands()])
def test_every_command_parses(line: str) -> None:
    words = shlex.split(line, comments=True)[1:]
    args = _parse(words, words[0])
    assert callable(args.run)


def test_an_unknown_flag_does_not_parse() -> None:
    with pytest.raises(UsageError):
        _parse(["serve", "--no-such-flag"], "serve")


@pytest.mark.parametrize("line", commands("make"))
def test_every_target_exists(line: str) -> None:
    target = shlex.split(line, comments=True)[1]
    assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)


def test_every_extra_exists() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    lines = [*commands("pip"), *commands("pipx"), *commands("uv")]
    named = {name for line in lines for name in re.search(r"\[(.*)\]", line)[1].split(",")}
    assert len(lines) == 3
    table = set(re.findall(r"^\| `(\w+)`", README, re.MULTILINE)) | set(
        re.findall(r"^\| `\w+`, `(\w+)`", README, re.MULTILINE)
    )
    assert named <= set(project["optional-dependencies"])
    assert table == set(project["optional-dependencies"])


def test_the_python_example_runs(capsys: pytest.CaptureFixture[str]) -> None:
    (example,) = code_blocks("python")
    exec(compile(example, "README.md", "exec"), {})
    out = capsys.readouterr().out
    assert out.startswith('{"intent": "PlayMusic", "slots": {"genre": "jazz", "artist": "Miles Davis"')
    assert '"intent": "GetWeather"' in out
    likelier, share = re.search(r"\('(.*)', (0\.\d+)\)", out).groups()
    assert "PlayMusic" in likelier
    assert float(share) > 0.9


def test_every_linked_file_exists() -> None:
    for file in [
        *ROOT.glob("*.md"),
        *ROOT.glob("*/README.md"),
        *ROOT.glob("*/*/README.md"),
        *ROOT.glob("*/*/*/README.md"),
    ]:
        for target in re.findall(r"\]\((?!https?:)([^)#]+)\)", file.read_text(encoding="utf-8")):
            assert (file.parent / target).exists(), (file, target)


@pytest.mark.parametrize("file", ["README.md", "edgelm/README.md"])
def test_a_page_is_short(file: str) -> None:
    text = (ROOT / file).read_text(encoding="utf-8").partition("## Glossary")[0]
    assert len(text.split()) <= 1500


def test_every_measured_figure_is_in_the_tables_of_bench() -> None:
    bench = (ROOT / "tests/bench/README.md").read_text(encoding="utf-8")
    section = re.search(r"## Measured\n(.*?)\n## ", README, re.DOTALL)[1]
    rows = re.findall(r"^\| .*\|$", section, re.MULTILINE)
    assert len(rows) == 5
    assert all(row in bench for row in rows)
    figures = set(re.findall(r"\d[\d,]*(?:\.\d+)?", re.sub(r"\[.*?\]\(.*?\)", "", section)))
    assert not {figure for figure in figures if figure not in bench}


def test_no_figure_was_forgotten() -> None:
    assert "@@" not in README
