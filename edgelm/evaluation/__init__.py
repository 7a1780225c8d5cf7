"""Quality of a model: perplexity on text and scores on tasks."""
