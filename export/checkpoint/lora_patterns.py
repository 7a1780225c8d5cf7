"""Matches an adapter's patterns with module names as PEFT does, in bounded time.

A pattern is a regular expression; even one of ten characters can take exponential time. Patterns that are plain names,
as PEFT writes them, are compared here. Others are matched in a child process with limits on time and memory.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Sequence
from typing import Final

MATCH_TIMEOUT_S: Final = 10.0
"""Maximum seconds for all patterns of an adapter and all its modules, with the start of the child process."""
MEMORY_BYTES: Final = 512_000_000
LITERAL_PATTERN: Final = re.compile(r"[A-Za-z0-9_.]+")

CHILD: Final = """
import json, re, resource, sys
resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
resource.setrlimit(resource.RLIMIT_AS, (int(sys.argv[1]), int(sys.argv[1])))
resource.setrlimit(resource.RLIMIT_CPU, (60, 60))  # it must end if its parent is killed
asked = json.load(sys.stdin)
found, patterns = [None] * len(asked["names"]), []
try:
    for text in asked["patterns"]:
        patterns.append(re.compile(rf"(.*\\.)?({text})"))
except Exception as error:
    print(json.dumps({"pattern": len(patterns), "error": str(error) or type(error).__name__}))
    sys.exit()
for i, name in enumerate(asked["names"]):
    found[i] = next((j for j, pattern in enumerate(patterns) if pattern.fullmatch(name)), None)
print(json.dumps({"found": found}))
"""


class PatternError(ValueError):
    """A pattern is invalid, or matching takes too much time or memory."""


def first_matches(patterns: Sequence[str], names: Sequence[str]) -> list[int | None]:
    """Return for each name the index of the first pattern that matches the name or its end, or None.

    `b` matches the end of `a.b`. A pattern is a regular expression, as in PEFT. Raises `PatternError`.
    """
    if not patterns or not names:
        return [None] * len(names)
    if all(LITERAL_PATTERN.fullmatch(pattern) for pattern in patterns) and not any("\n" in name for name in names):
        return [next((i for i, each in enumerate(patterns) if _is_end(each, name)), None) for name in names]
    question = json.dumps({"patterns": list(patterns), "names": list(names)})
    try:
        done = subprocess.run(
            [sys.executable, "-I", "-c", CHILD, str(MEMORY_BYTES)],
            input=question,
            capture_output=True,
            text=True,
            timeout=MATCH_TIMEOUT_S,
            check=False,
            start_new_session=True,  # Ctrl-C at the terminal does not interrupt it
        )
    except subprocess.TimeoutExpired:
        raise PatternError(f"the patterns take longer than {MATCH_TIMEOUT_S:g} s to match") from None
    if done.returncode != 0 or not done.stdout:
        raise PatternError(f"the patterns take more than {MEMORY_BYTES / 1e6:.0f} MB or too much stack to match")
    answer = json.loads(done.stdout)
    if "error" in answer:
        raise PatternError(f"the pattern {patterns[answer['pattern']]!r:.80} cannot be read: {answer['error']}")
    found: list[int | None] = answer["found"]
    return found


def _is_end(pattern: str, name: str) -> bool:
    """Return whether a name is the pattern or ends in it after a dot; a dot in the pattern matches any character."""
    before = len(name) - len(pattern)
    if before < 0 or (before > 0 and name[before - 1] != "."):
        return False
    end = name[before:]
    return end == pattern or all(wanted in (".", got) for wanted, got in zip(pattern, end, strict=True))
