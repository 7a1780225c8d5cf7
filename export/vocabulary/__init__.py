"""A smaller vocabulary for one domain: tokenizer, embedding and head shrink together.

`prune` chooses the tokens and rewrites tokenizer.json; `KeptRows` reads the rows of the weights that belong to them.
"""

from .pruning import PrunedVocabulary, prune
from .rows import KeptRows

__all__ = ["KeptRows", "PrunedVocabulary", "prune"]
