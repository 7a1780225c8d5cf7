"""Tries a constraint in a child process before it is compiled in this one.

A JSON schema of 60 bytes can take minutes, gigabytes, or overflow the stack, in a library that cannot be interrupted.
Therefore a child process with limits on time, memory and stack compiles each constraint and follows it for some tokens.
If the child fails, the constraint is refused and other requests are not affected. A child is reused until it fails or
its memory has grown.

The child runs no code from the current folder (see `edgelm.system.isolated_python`).
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
"""Time limit for compiling a constraint and following it for `SAMPLED_TOKENS` tokens."""
CPU_MARGIN_S: Final = 10
"""CPU time beyond that limit after which a child without a parent ends itself."""
START_TIMEOUT_S: Final = 60.0
"""Time limit for a child to load the tokenizer."""
MAX_CONSTRAINT_BYTES: Final = 256_000_000
"""Memory limit of one constraint, beyond the memory of an idle child."""
STACK_BYTES: Final = 4 << 20
"""Stack size of the trial: half of that of a thread in this process."""
SAMPLED_TOKENS: Final = 24
"""Tokens of the trial, each drawn at random from the allowed ones."""
MAX_GROWTH_BYTES: Final = MAX_CONSTRAINT_BYTES // 2
"""A child that has grown by more is not used again."""


class ConstraintSandbox:
    """Tries constraints for one vocabulary; the parameters are those of `ConstraintCompiler`.

    Safe to call from several threads.
    """

    def __init__(self, tokenizer: Path, vocab_size: int, eos_tokens: Iterable[int]) -> None:
        self._setup = {"tokenizer": str(tokenizer), "vocab_size": vocab_size, "eos_tokens": list(eos_tokens)}
        self._lock = threading.Lock()
        self._child: subprocess.Popen[bytes] | None = None
        self._is_closed = False

    def run(self, constraint: Constraint) -> int:
        """Return the approximate bytes of a constraint. Raises `RequestError` if it is invalid or over a limit."""
        value = list(constraint.value) if isinstance(constraint.value, tuple) else constraint.value
        with self._lock:
            child = self._child if self._child is not None and self._child.poll() is None else self._start()
            reply = _exchange(child, {"kind": constraint.kind, "value": value}, CONSTRAINT_TIMEOUT_S)
            if not reply.get("is_reusable"):
                self._stop()
        if reply.get("error"):
            raise RequestError("bad_request", f"{constraint.kind}: {reply['error']}")
        return int(reply["bytes"])

    def close(self) -> None:
        """Kill the child, if there is one, even during a trial."""
        self._is_closed = True
        child = self._child
        if child is not None:
            child.kill()  # ends a call of `run`, which holds the lock
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
            start_new_session=True,  # so that Ctrl-C in a terminal does not stop it
        )
        ready = _exchange(self._child, self._setup, START_TIMEOUT_S)
        if not ready.get("is_reusable"):
            self._stop()
            raise RequestError("internal", f"constraints cannot be tried: {ready.get('error')}")
        return self._child

    def _stop(self) -> None:
        if self._child is None:
            return
        self._child.kill()
        self._child.communicate()
        self._child = None


def _exchange(child: subprocess.Popen[bytes], message: dict[str, Any], timeout_s: float) -> dict[str, Any]:
    """Send a message to a child and return its reply, or an error if there is none."""
    stdin, stdout = child.stdin, child.stdout
    if stdin is None or stdout is None:
        raise AssertionError("a child has both pipes")
    try:
        stdin.write(json.dumps(message).encode() + b"\n")
        stdin.flush()
        if not select.select([stdout], [], [], timeout_s)[0]:
            return {"error": f"it takes longer than {timeout_s:g} s to prepare: make it simpler"}
        line = stdout.readline()
    except OSError:
        line = b""
    if not line:
        return {"error": f"it takes more than {MAX_CONSTRAINT_BYTES / 1e6:.0f} MB or too much stack: make it simpler"}
    reply: dict[str, Any] = json.loads(line)
    return reply


# --- in the child ---


def run_child() -> None:
    """Reply to each line of standard input with a JSON object: error, bytes, is_reusable."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    out = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # output of libraries must not mix with the replies
    from edgelm.text.constraint_compiler import ConstraintCompiler

    setup = json.loads(sys.stdin.readline())
    compiler = ConstraintCompiler(setup["tokenizer"], setup["vocab_size"], setup["eos_tokens"])
    _reply(out, {"is_reusable": True})
    before = read_process_memory().address_space
    limit = before + MAX_CONSTRAINT_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    threading.stack_size(STACK_BYTES)
    for line in sys.stdin:
        used = resource.getrusage(resource.RUSAGE_SELF)
        cpu_limit_s = int(used.ru_utime + used.ru_stime + CONSTRAINT_TIMEOUT_S) + CPU_MARGIN_S
        resource.setrlimit(resource.RLIMIT_CPU, (cpu_limit_s, resource.RLIM_INFINITY))  # if the parent dies
        message = json.loads(line)
        value = tuple(message["value"]) if isinstance(message["value"], list) else message["value"]
        reply: dict[str, Any] = {}
        thread = threading.Thread(target=_try, args=(compiler, Constraint(message["kind"], value), reply))
        start = read_process_memory().address_space
        thread.start()
        thread.join()
        now = read_process_memory().address_space
        reply["bytes"] = max(now - start, len(line))
        reply["is_reusable"] = now < before + MAX_GROWTH_BYTES
        _reply(out, reply)


def _try(compiler: Any, constraint: Constraint, reply: dict[str, Any]) -> None:
    """Compile a constraint and follow it for `SAMPLED_TOKENS` tokens; write an error to `reply`."""
    generator = np.random.default_rng(0)
    try:
        matcher = compiler.compile(constraint)
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
        reply["error"] = error.message.removeprefix(f"{constraint.kind} ").removeprefix("is not valid: ")
    except MemoryError:
        reply["error"] = f"it takes more than {MAX_CONSTRAINT_BYTES / 1e6:.0f} MB: make it simpler"
    except Exception as error:  # noqa: BLE001  an unknown failure refuses the constraint
        reply["error"] = f"it makes the grammar library fail: {error!r:.200}"


def _reply(out: IO[str], reply: dict[str, Any]) -> None:
    out.write(json.dumps(reply) + "\n")
    out.flush()
