"""Which of an adapter's patterns a module's name matches: as PEFT matches them, in bounded time.

A pattern is a regular expression, and one of ten characters can take longer than anyone waits. Names, as PEFT writes
them, are compared here; what has more in it is matched by a child process with limits on time and memory.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Sequence
from typing import Final

MATCH_TIMEOUT_S: Final = 10.0
"""How long all patterns of an adapter may take with all its modules, the child's start included."""
MEMORY_BYTES: Final = 512_000_000
LITERAL_PATTERN: Final = re.compile(r"[A-Za-z0-9_.]+")

CHILD: Final = """
import json, re, resource, sys
resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
resource.setrlimit(resource.RLIMIT_AS, (int(sys.argv[1]), int(sys.argv[1])))
resource.setrlimit(resource.RLIMIT_CPU, (60, 60))  # were its parent killed, it would go on for ever
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
    """A pattern cannot be read, or all together take too long."""


def first_matches(patterns: Sequence[str], names: Sequence[str]) -> list[int | None]:
    """Return for each name the index of the first pattern that is the name or the end of it, or None.

    `a.b` ends in `b`; a pattern is a regular expression, as in PEFT. Raises `PatternError`.
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
            start_new_session=True,  # Ctrl-C at a terminal is not for it
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
    """Whether a name is a pattern of letters, digits, _ and ., or ends in it behind a dot; a dot is any character."""
    before = len(name) - len(pattern)
    if before < 0 or (before > 0 and name[before - 1] != "."):
        return False
    end = name[before:]
    return end == pattern or all(wanted in (".", got) for wanted, got in zip(pattern, end, strict=True))
