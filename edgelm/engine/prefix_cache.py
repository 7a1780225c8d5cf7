"""What sequences computed, put to use by later ones: rows begin with the longest prefix that is known."""

from __future__ import annotations

from edgelm.bundle.bundle_folder import Bundle
from edgelm.engine.radix_tree import RadixTree
from edgelm.engine.sequence import Sequence
from edgelm.runtime.prefix_file import map_prefix
from edgelm.runtime.runner import Runner


class PrefixCache:
    """Moves key/value memory between a session's rows and a cache of at most `max_bytes`, the static prefix beside it.

    What a client's sequences computed is found by its own later ones alone, and by nobody's where they are apart: else
    `cached_tokens`, or the time to the first token, would tell a client what others have asked.

    Positions embedded for the original context and for LongRoPE's long one are kept apart: they do not fit each other.
    Where a model has both, each kind has half of the bytes.
    """

    def __init__(self, runner: Runner, bundle: Bundle, max_bytes: int) -> None:
        self._runner = runner
        cache = bundle.manifest.cache
        each = max_bytes if runner.long_from is None else max_bytes // 2
        self._prefixes = {is_long_rope: RadixTree(each, cache.bytes_per_token()) for is_long_rope in (False, True)}
        static = map_prefix(bundle)
        if static is not None:
            self._prefixes[False].pin(*static)

    def load_prefix(self, sequence: Sequence) -> None:
        """Begin a sequence's row with what is known of its prompt; the last token's logits are always computed.

        Where a pass's length changes its rounding, a seeded sequence begins with the static prefix at most, which is
        always there: what was asked before would change the lengths of its passes.
        """
        long_from = self._runner.long_from
        sequence.is_long_rope = long_from is not None and sequence.length > long_from
        known, asked = self._prefixes[sequence.is_long_rope], sequence.history[: sequence.length - 1]
        pieces = known.match_prefix(
            asked, sequence.request.owner, pinned_only=sequence.is_seeded and not self._runner.is_invariant
        )
        if pieces:
            self._runner.write_row(sequence.row, pieces)
            sequence.computed_tokens = sum(piece[0].shape[1] for piece in pieces)
            sequence.cached = min(sequence.computed_tokens, sequence.prompt_tokens)

    def store(self, sequence: Sequence) -> None:
        """Keep what a sequence has computed."""
        tokens, row = sequence.history[: sequence.computed_tokens], sequence.row
        known = self._prefixes[sequence.is_long_rope]
        known.insert(tokens, lambda start, stop: self._runner.read_row(row, start, stop), sequence.request.owner)
