"""Training of small students: supervised, or distilled from a teacher's logits (Hinton et al. 2015).

`data` reads and packs examples, `losses` defines the loss, `trainer` minimizes it, `shape` and `student_tokenizer` make
a new student, `distill` runs all from a data file to a checkpoint directory. `snips` and `builtin_recipe` are the
recipe of the built-in model. Only `losses`, `trainer`, `student` and their importers need torch.
"""
