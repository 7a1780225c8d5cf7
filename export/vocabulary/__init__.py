"""A smaller vocabulary for one domain: tokenizer, embedding and head are pruned together.

`prune_vocabulary` chooses the tokens and rewrites tokenizer.json. `PrunedWeights` reads the matching rows of the
weights.
"""

from .kept_rows import PrunedWeights
from .pruning import PrunedVocabulary, prune_vocabulary

__all__ = ["PrunedVocabulary", "PrunedWeights", "prune_vocabulary"]
