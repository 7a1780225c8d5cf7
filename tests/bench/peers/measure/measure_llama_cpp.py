"""llama.cpp's side, run by an interpreter that has llama-cpp-python: a GGUF file through llama.cpp's own functions.

Its best form: the file mapped, flash attention as it chooses, prompts in pieces of 512, logits of last tokens only, the
sequences of all streams in one batch over one memory. Token ids are written straight into the batch's arrays.
"""

import ctypes
import os
import sys
import time

import job as protocol
import llama_cpp as lib
import numpy as np

PIECE = 512


@lib.llama_log_callback
def ignore(*_):
    """Drop llama.cpp's log lines."""


class Gguf:
    version = lib.__version__

    def __init__(self, job):
        lib.llama_log_set(ignore, ctypes.c_void_p(0))
        lib.llama_backend_init()
        self.model = lib.llama_model_load_from_file(os.fsencode(job["model"]), lib.llama_model_default_params())
        params = lib.llama_context_default_params()
        streams = max(job.get("streams", [1]))
        together = streams * (job.get("stream_prompt", 0) + job.get("new_tokens", 0))
        params.n_ctx = max(job["context"], together)  # one memory, in which all streams must find room
        params.n_batch = params.n_ubatch = PIECE
        params.n_threads = params.n_threads_batch = job["threads"]
        params.n_seq_max, params.kv_unified = streams, True
        self.context = lib.llama_init_from_model(self.model, params)
        if not self.model or not self.context:
            sys.exit(f"llama.cpp cannot load {job['model']}")
        self.vocab_size = lib.llama_vocab_n_tokens(lib.llama_model_get_vocab(self.model))
        self.memory = lib.llama_get_memory(self.context)
        self.batch = lib.llama_batch_init(PIECE, 0, 1)
        arrays = (self.batch.token, self.batch.pos, self.batch.n_seq_id, self.batch.logits)
        self.tokens, self.positions, counts, self.wanted = (np.ctypeslib.as_array(each, (PIECE,)) for each in arrays)
        counts[:] = 1
        self.rows = np.full(PIECE, -1)

    def decode(self, tokens, positions, rows, wanted):
        """Compute tokens; return the logits of those wanted, float32 [wanted, V]."""
        count = len(tokens)
        self.batch.n_tokens = count
        self.tokens[:count], self.positions[:count], self.wanted[:count] = tokens, positions, wanted
        for i in np.flatnonzero(self.rows[:count] != rows):
            self.batch.seq_id[i][0] = int(rows[i])
        self.rows[:count] = rows
        if lib.llama_decode(self.context, self.batch):
            sys.exit(f"llama.cpp cannot decode {count} tokens")
        outputs = int(np.count_nonzero(wanted))
        if not outputs:
            return None
        return np.ctypeslib.as_array(lib.llama_get_logits(self.context), (outputs, self.vocab_size))

    def prefill(self, tokens, positions, rows):
        """Compute prompts in pieces; return the likeliest token after each row's last one."""
        lasts = np.append(rows[1:] != rows[:-1], True)
        found = []
        for at in range(0, len(tokens), PIECE):
            piece = slice(at, at + PIECE)
            logits = self.decode(tokens[piece], positions[piece], rows[piece], lasts[piece])
            if logits is not None:
                found.append(logits.argmax(axis=1))
        return np.concatenate(found)

    def forget(self, start):
        """Drop what row 0 knows from a position on."""
        lib.llama_memory_seq_rm(self.memory, 0, start, -1)

    def first(self, prompt, start):
        """Compute a prompt of row 0 from a position on."""
        return self.prefill(prompt[start:], np.arange(start, len(prompt)), np.zeros(len(prompt) - start, int))

    def answer(self, prompt, count):
        lib.llama_memory_clear(self.memory, True)
        row, last = np.zeros(1, int), np.ones(1, bool)
        started = time.perf_counter()
        token = self.first(prompt, 0)
        first = time.perf_counter()
        for position in range(len(prompt), len(prompt) + count - 1):
            token = self.decode(token, position, row, last).argmax(axis=1)
        return first - started, time.perf_counter() - first

    def warm(self, system, questions):
        lib.llama_memory_clear(self.memory, True)
        self.first(np.concatenate([system, questions[-1]]), 0)
        times = []
        for question in questions[:-1]:
            prompt = np.concatenate([system, question])
            started = time.perf_counter()
            self.forget(len(system))
            self.first(prompt, len(system))
            times.append(time.perf_counter() - started)
        return times

    def streams(self, prompts, count):
        lib.llama_memory_clear(self.memory, True)
        streams, length = prompts.shape
        rows, lasts = np.arange(streams), np.ones(streams, bool)
        tokens = self.prefill(prompts.ravel(), np.tile(np.arange(length), streams), np.repeat(rows, length))
        for position in range(length, length + count - 1):
            tokens = self.decode(tokens, position, rows, lasts).argmax(axis=1)

    def logits(self, documents, out):
        done = 0
        for ids in documents:
            lib.llama_memory_clear(self.memory, True)
            for at in range(0, len(ids), PIECE):
                piece = ids[at : at + PIECE]
                every = np.ones(len(piece), bool)
                positions, rows = np.arange(at, at + len(piece)), np.zeros(len(piece), int)
                out[done : done + len(piece)] = self.decode(piece, positions, rows, every)
                done += len(piece)


if __name__ == "__main__":
    protocol.run(Gguf)
