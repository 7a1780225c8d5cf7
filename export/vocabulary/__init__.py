"""A smaller vocabulary for one domain: tokenizer, embedding and head shrink together.

`prune` chooses the tokens and rewrites tokenizer.json; whoever reads the weights takes the rows it names.
"""

from .pruning import PrunedVocabulary, prune

__all__ = ["PrunedVocabulary", "prune"]
