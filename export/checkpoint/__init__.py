"""Where weights, configuration and tokenizer of a model come from: a Hugging Face directory or a hub id."""

from .huggingface import Checkpoint, Source, locate, open_checkpoint, read_json

__all__ = ["Checkpoint", "Source", "locate", "open_checkpoint", "read_json"]
