"""The prefix cache: a new row starts with the longest known prefix of its prompt, which is then not computed again."""

from __future__ import annotations

from edgelm.bundle.bundle_folder import Bundle
from edgelm.engine.radix_tree import RadixTree
from edgelm.engine.sequence import Sequence
from edgelm.runtime.prefix_file import map_prefix
from edgelm.runtime.runner import Runner


class PrefixCache:
    """Copies keys and values between the rows of a runner and a cache of at most `max_bytes`, plus the static prefix.

    A client's entries are found only by its own later sequences, those of cache-isolated requests by none. Otherwise
    `cached_tokens` or the time to the first token would reveal to a client what others asked.

    Positions embedded for LongRoPE's original and long context are kept apart, because they cannot be combined. If a
    model has both, each kind gets half of the bytes.
    """

    def __init__(self, runner: Runner, bundle: Bundle, max_bytes: int) -> None:
        self._runner = runner
        cache = bundle.manifest.cache
        tree_bytes = max_bytes if runner.long_from is None else max_bytes // 2
        self._trees = {is_long_rope: RadixTree(tree_bytes, cache.bytes_per_token()) for is_long_rope in (False, True)}
        static = map_prefix(bundle)
        if static is not None:
            self._trees[False].pin(*static)

    def load_prefix(self, sequence: Sequence) -> None:
        """Write the longest known prefix of the prompt to the sequence's row, always without the last token.

        If the length of a pass changes its rounding, a seeded sequence uses only the static prefix, which is always
        there: with other prefixes the lengths of its passes would depend on earlier requests.
        """
        long_from = self._runner.long_from
        sequence.is_long_rope = long_from is not None and sequence.length > long_from
        tree, prompt = self._trees[sequence.is_long_rope], sequence.history[: sequence.length - 1]
        pieces = tree.match_prefix(
            prompt, sequence.request.owner, pinned_only=sequence.is_seeded and not self._runner.is_invariant
        )
        if pieces:
            self._runner.write_row(sequence.row, pieces)
            sequence.computed_tokens = sum(piece[0].shape[1] for piece in pieces)
            sequence.cached_tokens = min(sequence.computed_tokens, sequence.prompt_tokens)

    def store(self, sequence: Sequence) -> None:
        """Add the computed tokens of a sequence to the cache."""
        tokens, row = sequence.history[: sequence.computed_tokens], sequence.row
        tree = self._trees[sequence.is_long_rope]
        tree.insert(tokens, lambda start, stop: self._runner.read_row(row, start, stop), sequence.request.owner)
