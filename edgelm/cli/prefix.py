"""`edgelm prefix`: precompute the common beginning of prompts and store it in a bundle."""

from __future__ import annotations

import argparse
import json

from edgelm.bundle.bundle_folder import Bundle, open_bundle
from edgelm.bundle.store import BUILTIN
from edgelm.cli.flags import THREADS_HELP
from edgelm.cli.tables import prefix_text
from edgelm.errors import EdgelmError, UsageError
from edgelm.text.static_prompt import read_prefix_text, tokenize_prefix
from edgelm.text.tokenizer import Tokenizer

EPILOG = """\
examples:
  edgelm prefix smollm2/ system.json     messages: [{"role": "system", "content": "Answer in one sentence."}]
  edgelm prefix smollm2/ examples.txt    plain text: prompts must begin with exactly these characters
  edgelm prefix smollm2/ --remove

A running service is not affected: it uses the prefix that it loaded.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.epilog = EPILOG
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("bundle", metavar="BUNDLE", help="a bundle's directory, or a name shown by `edgelm list`")
    parser.add_argument(
        "file", metavar="FILE", nargs="?", help="text, or a JSON list of messages; replaces an earlier prefix"
    )
    parser.add_argument("--remove", action="store_true", help="remove the bundle's prefix")
    parser.add_argument("--threads", type=int, metavar="N", help=THREADS_HELP)
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(args: argparse.Namespace) -> int:
    """Add, replace or remove a bundle's static prefix."""
    if (args.file is None) != args.remove:
        raise UsageError("exactly one of FILE or --remove is required")
    if args.bundle == BUILTIN:
        raise EdgelmError("the built-in model cannot be changed: copy its directory and use the copy")
    changed = _removed(args.bundle) if args.remove else _added(args.bundle, args.file, args.threads)
    prefix = changed.manifest.prefix
    if args.json:
        size = 0 if prefix is None else changed.manifest.files[prefix.file].bytes
        tokens = 0 if prefix is None else len(prefix.tokens)
        facts = {"bundle": str(changed.path), "tokens": tokens, "bytes": size, "digest": changed.manifest.digest}
        print(json.dumps(facts))
    else:
        print(f"{changed.path}: static prefix: {prefix_text(changed) or 'none'}")
    return 0


def _added(path: str, file: str, threads: int | None) -> Bundle:
    from edgelm.runtime.prefix_file import add_prefix, open_without_prefix

    opening = read_prefix_text(file)
    bundle = open_without_prefix(path)
    return add_prefix(bundle, tokenize_prefix(opening, Tokenizer.of_bundle(bundle)), threads=threads)


def _removed(path: str) -> Bundle:
    from edgelm.runtime.prefix_file import remove_prefix

    return remove_prefix(open_bundle(path, verify=False))
