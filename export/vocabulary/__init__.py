"""A smaller vocabulary for one domain: tokenizer, embedding and head shrink together.

`prune` chooses the tokens and rewrites tokenizer.json; `KeptRows` reads the rows of the weights that belong to them.
"""

from .kept_rows import KeptRows
from .pruning import PrunedVocabulary, prune

__all__ = ["KeptRows", "PrunedVocabulary", "prune"]
