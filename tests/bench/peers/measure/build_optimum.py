"""A checkpoint as optimum exports it, in float32, its default. Usage: python build_optimum.py CHECKPOINT OUT."""

import sys

from optimum.onnxruntime import ORTModelForCausalLM

if __name__ == "__main__":
    ORTModelForCausalLM.from_pretrained(sys.argv[1], export=True).save_pretrained(sys.argv[2])
