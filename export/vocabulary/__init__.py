"""A smaller vocabulary for one domain: tokenizer, embedding and head shrink together.

`prune_vocabulary` chooses the tokens and rewrites tokenizer.json; `PrunedWeights` reads the rows of the weights that
belong to them.
"""

from .kept_rows import PrunedWeights
from .pruning import PrunedVocabulary, prune_vocabulary

__all__ = ["PrunedVocabulary", "PrunedWeights", "prune_vocabulary"]
