"""Constraints are tried in a process of its own before anyone compiles them here.

A JSON schema of 60 bytes can take minutes, gigabytes, or more stack than there is, in a library that cannot be
interrupted. So each is compiled and followed for some tokens by a child with limits on time, memory and stack; what it
does not survive is refused, and costs nobody else anything. A child serves until it fails or has grown.

Nothing of the current folder is run by the child (see `edgelm.system.isolated_python`).
"""

from __future__ import annotations

import json
import os
import resource
import select
import subprocess
import sys
import threading
from collections.abc import Iterable
from pathlib import Path
from typing import IO, Any, Final

import numpy as np

from edgelm.errors import RequestError
from edgelm.system.isolated_python import build_python_command
from edgelm.system.memory import read_process_memory
from edgelm.types import Constraint

CONSTRAINT_TIMEOUT_S: Final = 3.0
"""How long a constraint may take, compiled and followed for `SAMPLED_TOKENS` tokens."""
SPARE_CPU_S: Final = 10
"""Processor time beside that, after which a child whose parent is gone ends by itself."""
START_S: Final = 60.0
"""How long a child may take to read the tokenizer."""
MEMORY_BYTES: Final = 256_000_000
"""How much a constraint may take beside what the child took before."""
STACK_BYTES: Final = 4 << 20
"""Stack that it is tried with: half of what a thread here has."""
SAMPLED_TOKENS: Final = 24
"""Tokens that it is followed for, each drawn from those that it allows."""
GROWN_BYTES: Final = MEMORY_BYTES // 2
"""A child that keeps more than so much is not used again."""


class ConstraintSandbox:
    """Tries constraints for one vocabulary; parameters as those of `ConstraintCompiler`.

    Safe to call from several threads.
    """

    def __init__(self, tokenizer: Path, vocab_size: int, eos_tokens: Iterable[int]) -> None:
        self._setup = {"tokenizer": str(tokenizer), "vocab_size": vocab_size, "eos_tokens": list(eos_tokens)}
        self._lock = threading.Lock()
        self._child: subprocess.Popen[bytes] | None = None
        self._is_closed = False

    def run(self, constraint: Constraint) -> int:
        """Return about how many bytes a constraint takes. Raises `RequestError` for one that does not survive."""
        value = list(constraint.value) if isinstance(constraint.value, tuple) else constraint.value
        with self._lock:
            child = self._child if self._child is not None and self._child.poll() is None else self._start()
            answer = _exchange(child, {"kind": constraint.kind, "value": value}, CONSTRAINT_TIMEOUT_S)
            if not answer.get("goes_on"):
                self._stop()
        if answer.get("error"):
            raise RequestError("bad_request", f"{constraint.kind}: {answer['error']}")
        return int(answer["bytes"])

    def close(self) -> None:
        """End the child, if there is one, whatever it does."""
        self._is_closed = True
        child = self._child
        if child is not None:
            child.kill()  # so that `run` ends, which may hold the lock
        with self._lock:
            self._stop()

    def _start(self) -> subprocess.Popen[bytes]:
        if self._is_closed:
            raise RequestError("interrupted", "the service stopped before the constraint was tried")
        self._child = subprocess.Popen(
            build_python_command("edgelm.engine.constraint_sandbox", "run_child"),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,  # Ctrl-C at a terminal is not for it
        )
        ready = _exchange(self._child, self._setup, START_S)
        if not ready.get("goes_on"):
            self._stop()
            raise RequestError("internal", f"constraints cannot be tried: {ready.get('error')}")
        return self._child

    def _stop(self) -> None:
        if self._child is None:
            return
        self._child.kill()
        self._child.communicate()
        self._child = None


def _exchange(child: subprocess.Popen[bytes], question: dict[str, Any], limit_s: float) -> dict[str, Any]:
    """Return a child's answer, or what its silence means."""
    asked, answered = child.stdin, child.stdout
    if asked is None or answered is None:
        raise AssertionError("a child has both pipes")
    try:
        asked.write(json.dumps(question).encode() + b"\n")
        asked.flush()
        if not select.select([answered], [], [], limit_s)[0]:
            return {"error": f"it takes longer than {limit_s:g} s to prepare: make it simpler"}
        line = answered.readline()
    except OSError:
        line = b""
    if not line:
        return {"error": f"it takes more than {MEMORY_BYTES / 1e6:.0f} MB or too much stack: make it simpler"}
    found: dict[str, Any] = json.loads(line)
    return found


# --- in the child ---


def run_child() -> None:
    """Answer a line for each line until the input ends: a JSON object with error, bytes and goes_on."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    out = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # whatever a library prints is no answer
    from edgelm.text.grammar import ConstraintCompiler

    setup = json.loads(sys.stdin.readline())
    grammar = ConstraintCompiler(setup["tokenizer"], setup["vocab_size"], setup["eos_tokens"])
    _tell(out, {"goes_on": True})
    before = read_process_memory().address_space
    limit = before + MEMORY_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    threading.stack_size(STACK_BYTES)
    for line in sys.stdin:
        used = resource.getrusage(resource.RUSAGE_SELF)
        spent = int(used.ru_utime + used.ru_stime + CONSTRAINT_TIMEOUT_S) + SPARE_CPU_S
        resource.setrlimit(resource.RLIMIT_CPU, (spent, resource.RLIM_INFINITY))  # should the parent be gone meanwhile
        asked = json.loads(line)
        value = tuple(asked["value"]) if isinstance(asked["value"], list) else asked["value"]
        answer: dict[str, Any] = {}
        thread = threading.Thread(target=_try, args=(grammar, Constraint(asked["kind"], value), answer))
        start = read_process_memory().address_space
        thread.start()
        thread.join()
        now = read_process_memory().address_space
        answer["bytes"] = max(now - start, len(line))
        answer["goes_on"] = now < before + GROWN_BYTES
        _tell(out, answer)


def _try(grammar: Any, constraint: Constraint, answer: dict[str, Any]) -> None:
    """Compile a constraint and follow it for some tokens."""
    generator = np.random.default_rng(0)
    try:
        matcher = grammar.compile(constraint)
        for _ in range(SAMPLED_TOKENS):
            matcher.forced_tokens()
            bits = np.unpackbits(matcher.mask().view(np.uint8), bitorder="little")
            allowed = np.flatnonzero(bits)
            if matcher.is_finished or not len(allowed):
                break
            matcher.accept(int(generator.choice(allowed)))
            if matcher.is_finished:
                break
    except RequestError as error:
        answer["error"] = error.message.removeprefix(f"{constraint.kind} ").removeprefix("is not valid: ")
    except MemoryError:
        answer["error"] = f"it takes more than {MEMORY_BYTES / 1e6:.0f} MB: make it simpler"
    except Exception as error:  # noqa: BLE001  what is not understood is not let through
        answer["error"] = f"it breaks its library: {error!r:.200}"


def _tell(out: IO[str], answer: dict[str, Any]) -> None:
    out.write(json.dumps(answer) + "\n")
    out.flush()
