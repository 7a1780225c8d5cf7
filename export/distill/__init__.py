"""Training of small students: supervised, or distilled from a teacher's logits (Hinton et al. 2015).

`data` reads and packs, `losses` says what is minimized, `trainer` minimizes it, `shape` and `tokenizer` make a
student from nothing, `pipeline` is the whole road from a data file to a checkpoint directory. `snips` and
`builtin` are the recipe of the built-in model. Only `losses`, `trainer`, `student` and what imports them need torch.
"""
