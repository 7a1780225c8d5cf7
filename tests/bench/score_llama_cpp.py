"""llama.cpp's side of quality.py, run by an interpreter that has it: logits of tokens under one of its formats.

Usage: python score_llama_cpp.py F32.gguf TOKENS.npz OUT.npy FORMAT THREADS. FORMAT is F32, or one of llama.cpp's own
(Q4_0, Q8_0 ...), with "-pure" behind it to quantize every matrix alike instead of by llama.cpp's default mixture.
TOKENS.npz holds `tokens`, all documents' ids behind each other, and `lengths` of the documents. OUT.npy gets float32
[tokens, vocabulary], the logits after every token. Prints one JSON object: the version, the bytes and weights of the
matrices, and the bytes of the file. It needs llama-cpp-python, gguf and numpy.

Keys and values are kept in float32, so that only the weights' format differs (and the activations', which llama.cpp
rounds to 8 bits before it multiplies them with quantized weights).
"""

import ctypes
import json
import os
import sys
import tempfile
from pathlib import Path

import gguf
import llama_cpp
import numpy as np

F32 = 0
"""ggml's number of the type float32."""


@llama_cpp.llama_log_callback
def ignore(*_):
    """Drop llama.cpp's log lines."""


def quantize(source, out, form, threads):
    """Write a quantized copy of a float32 file with llama.cpp's own quantizer."""
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{form.removesuffix('-pure')}")
    params.pure = form.endswith("-pure")
    params.nthread = threads
    if llama_cpp.llama_model_quantize(os.fsencode(source), os.fsencode(out), ctypes.byref(params)):
        sys.exit(f"llama.cpp cannot quantize {source} to {form}")


def sizes(path):
    """Count bytes and weights of matrices, and bytes of the file."""
    tensors = gguf.GGUFReader(path).tensors
    matrices = [tensor for tensor in tensors if tensor.n_elements > max(tensor.shape)]
    return {
        "matrix_bytes": int(sum(tensor.n_bytes for tensor in matrices)),
        "matrix_weights": int(sum(tensor.n_elements for tensor in matrices)),
        "bytes": Path(path).stat().st_size,
        "types": {tensor.name: tensor.tensor_type.name for tensor in matrices},
    }


def score(path, tokens, lengths, out, threads):
    """Write the logits after every token; every document starts with empty memory."""
    model = llama_cpp.llama_model_load_from_file(os.fsencode(path), llama_cpp.llama_model_default_params())
    params = llama_cpp.llama_context_default_params()
    params.n_ctx = params.n_batch = params.n_ubatch = int(max(lengths))
    params.n_threads = params.n_threads_batch = threads
    params.type_k = params.type_v = F32
    params.flash_attn_type = llama_cpp.LLAMA_FLASH_ATTN_TYPE_DISABLED
    context = llama_cpp.llama_init_from_model(model, params)
    if not model or not context:
        sys.exit(f"llama.cpp cannot load {path}")
    vocab = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(model))
    logits = np.lib.format.open_memmap(out, "w+", np.float32, (len(tokens), vocab))
    batch = llama_cpp.llama_batch_init(int(max(lengths)), 0, 1)
    start = 0
    for length in map(int, lengths):
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(context), True)
        batch.n_tokens = length
        for i in range(length):
            batch.token[i], batch.pos[i], batch.logits[i] = int(tokens[start + i]), i, 1
            batch.n_seq_id[i], batch.seq_id[i][0] = 1, 0
        if llama_cpp.llama_decode(context, batch):
            sys.exit(f"llama.cpp cannot decode the document at token {start}")
        rows = np.ctypeslib.as_array(llama_cpp.llama_get_logits(context), (length, vocab))
        logits[start : start + length] = rows
        start += length
    logits.flush()
    llama_cpp.llama_batch_free(batch)
    llama_cpp.llama_free(context)
    llama_cpp.llama_model_free(model)


def main():
    source, tokens, out, form, threads = sys.argv[1], np.load(sys.argv[2]), sys.argv[3], sys.argv[4], int(sys.argv[5])
    llama_cpp.llama_log_set(ignore, ctypes.c_void_p(0))
    llama_cpp.llama_backend_init()
    with tempfile.TemporaryDirectory(dir=Path(out).parent) as scratch:
        path = source
        if form != "F32":
            path = str(Path(scratch) / "model.gguf")
            quantize(source, path, form, threads)
        score(path, tokens["tokens"], tokens["lengths"], out, threads)
        print(json.dumps({"version": llama_cpp.__version__, **sizes(path)}))


if __name__ == "__main__":
    main()
