"""A checkpoint as a GGUF file in one of llama.cpp's formats: run by an interpreter that has llama.cpp.

Usage: python build_gguf.py F32.gguf OUT.gguf FORMAT THREADS. Prints the bytes of its matrices as JSON.
"""

import ctypes
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

import llama_cpp
import score_llama_cpp


def main():
    llama_cpp.llama_log_set(score_llama_cpp.ignore, ctypes.c_void_p(0))
    llama_cpp.llama_backend_init()
    source, out, form, threads = sys.argv[1:]
    score_llama_cpp.quantize(source, out, form, int(threads))
    print(json.dumps(score_llama_cpp.sizes(out)))


if __name__ == "__main__":
    main()
