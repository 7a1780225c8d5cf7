"""What sequences computed, put to use by later ones: rows begin with the longest prefix that is known."""

from __future__ import annotations

from edgelm.bundle import Cache
from edgelm.prefixes import Prefixes
from edgelm.sequence import Sequence
from edgelm.session import Session


class Reuse:
    """Moves key/value memory between a session's rows and a cache of at most `max_bytes`.

    Positions embedded for the original context and for LongRoPE's long one are kept apart: they do not fit each other.
    Where a model has both, each kind has half of the bytes.
    """

    def __init__(self, session: Session, cache: Cache, max_bytes: int) -> None:
        self._session = session
        each = max_bytes if session.long_from is None else max_bytes // 2
        self._prefixes = {is_long: Prefixes(each, cache.bytes_per_token()) for is_long in (False, True)}

    def begin(self, sequence: Sequence) -> None:
        """Begin a sequence's row with what is known of its prompt; the last token's logits are always computed.

        A seeded sequence is computed from its start: passes of other lengths round otherwise.
        """
        long_from = self._session.long_from
        sequence.is_long = long_from is not None and sequence.length > long_from
        if sequence.is_seeded:
            return
        pieces = self._prefixes[sequence.is_long].find(sequence.history[: sequence.length - 1])
        if pieces:
            self._session.begin_row(sequence.row, pieces)
            sequence.computed = sum(piece[0].shape[1] for piece in pieces)
            sequence.cached = min(sequence.computed, sequence.prompt_tokens)

    def keep(self, sequence: Sequence) -> None:
        """Keep what a sequence has computed."""
        tokens, row = sequence.history[: sequence.computed], sequence.row
        self._prefixes[sequence.is_long].keep(tokens, lambda start, stop: self._session.read_row(row, start, stop))
