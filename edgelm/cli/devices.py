"""`edgelm devices`: list the board profiles, detect this board, and test edgelm on it or on an emulated one."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgelm.cli.extras import import_extra

if TYPE_CHECKING:
    from collections.abc import Callable

MARKS = {"ok": "ok     ", "failed": "FAILED ", "skipped": "skipped", "info": "       "}

NOT_EMULATED = ("speed", "memory")
"""Checks that measure QEMU, not the board: not printed for an emulated one."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    actions = parser.add_subparsers(dest="action", metavar="{list,detect,smoke,emulate}", required=True)

    def add(name: str, run: Callable[[argparse.Namespace], int], summary: str) -> argparse.ArgumentParser:
        action = actions.add_parser(
            name, help=summary, description=summary[0].upper() + summary[1:] + ".", allow_abbrev=False
        )
        action.set_defaults(act=run)
        action.add_argument("--json", action="store_true", help="print one JSON object")
        action.add_argument("--debug", action="store_true", help="show the traceback of an error")
        return action

    add("list", _list, "list the board profiles")
    add("detect", _detect, "show which board this is, its memory, temperature and throttling")
    smoke = add("smoke", _smoke, "test edgelm on this board: inference, MQTT, memory, temperature")
    smoke.add_argument(
        "--threads", type=int, metavar="N", help="threads for inference (default: chosen by the runtime)"
    )
    smoke.add_argument("--broker", metavar="URL", help="broker for the MQTT check (default: start mosquitto or amqtt)")
    emulate = add(
        "emulate",
        _emulate,
        "run the smoke test on an emulated arm64 processor and compare the answers with this machine's",
    )
    emulate.add_argument(
        "board", metavar="BOARD", help="a name shown by `edgelm devices list`, or a .toml board profile"
    )
    emulate.add_argument(
        "--cache",
        type=Path,
        metavar="DIR",
        help="folder of the emulated system, 200 MB (default: ~/.cache/edgelm/emulate)",
    )
    for action in (smoke, emulate):
        action.add_argument("--bundle", default="builtin", metavar="BUNDLE", help="bundle to run (default: builtin)")
        action.add_argument("--prompt", metavar="TEXT", help="prompt (default: a spoken command)")


def run(args: argparse.Namespace) -> int:
    """Run the chosen action; return 1 if a check failed."""
    return int(args.act(args))


def _list(args: argparse.Namespace) -> int:
    profiles = import_extra("edgelm_devices.board_profile", "edgelm devices").load_profiles().values()
    if args.json:
        print(json.dumps({"boards": [profile.to_dict() for profile in profiles]}))
        return 0
    for profile in profiles:
        cpu, memory = profile.cpu, profile.memory
        facts = f"{cpu.cores} x {cpu.core}, {cpu.max_mhz} MHz" if cpu else ""
        if memory:
            facts += f"; {'/'.join(map(str, memory.sizes_gb))} GB at {memory.bandwidth_gb_s:g} GB/s"
        print(f"{profile.name:<10} {profile.title:<24} {facts}".rstrip())
    return 0


def _detect(args: argparse.Namespace) -> int:
    board = import_extra("edgelm_devices.detect", "edgelm devices").detect_board()
    if args.json:
        print(json.dumps(board.to_dict()))
        return 0
    profile = f"{board.profile.name}, by its {board.matched_by}" if board.profile else "none matches"
    throttling = board.throttling
    rows = {
        "model": board.model or "unknown",
        "profile": profile,
        "processor": f"{board.cores} x {board.processor or 'unknown'} ({board.machine})",
        "features": " ".join(board.features) if len(board.features) < 40 else f"{len(board.features)} flags (--json)",
        "memory": _size(board.memory_bytes),
        "available": _size(board.memory_available_bytes),
        "temperature": f"{board.temperature_c:.1f} C" if board.temperature_c is not None else "unknown",
        "throttling": "unknown" if throttling is None else ", ".join(throttling.now) or "none",
    }
    for name, value in rows.items():
        print(f"{name:<12} {value}")
    return 0


def _smoke(args: argparse.Namespace) -> int:
    smoke = import_extra("edgelm_devices.smoke", "edgelm devices smoke")
    report = smoke.run_smoke_test(
        args.bundle,
        prompt=args.prompt,
        threads=args.threads,
        broker=args.broker,
        on_check=None if args.json else _show,
    )
    if args.json:
        print(json.dumps(report.to_dict()))
    else:
        print("all checks passed" if report.ok else "some checks FAILED: see above")
    return 0 if report.ok else 1


def _emulate(args: argparse.Namespace) -> int:
    module = import_extra("edgelm_devices.emulate", "edgelm devices emulate")
    profile = import_extra("edgelm_devices.board_profile", "edgelm devices").load_profile(args.board)
    result = module.emulate(
        profile,
        args.bundle,
        prompt=args.prompt,
        cache=args.cache or module.default_cache_folder(),
        on_status=lambda line: print(line, file=sys.stderr, flush=True),
    )
    if args.json:
        print(json.dumps(result.to_dict()))
        return 0 if result.ok else 1
    for check in result.emulated["checks"]:
        if check["name"] not in NOT_EMULATED:
            _print_check(check["name"], check["status"], check["told"])
    _print_check("tokens", *result.verdict)
    print(f"emulated {profile.title}: {'all checks passed' if result.ok else 'some checks FAILED'}")
    return 0 if result.ok else 1


def _show(check: Any) -> None:
    _print_check(check.name, check.status, check.message)


def _print_check(name: str, status: str, message: str) -> None:
    print(f"{MARKS[status]}  {name:<12} {message}", flush=True)


def _size(size: int | None) -> str:
    return "unknown" if size is None else f"{size / 1e9:.2f} GB"
