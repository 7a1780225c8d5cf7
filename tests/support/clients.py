"""A client of a worker that can block the worker, and helpers that submit requests."""

from __future__ import annotations

import threading

from edgelm.types import Request, SamplingParams

PATIENCE_S = 60.0
PROMPT = (5, 6, 7, 8)


class Client:
    """Collects the chunks of one request. With `gate` the worker blocks at the first chunk until `gate` is set."""

    def __init__(self, gate=False):
        self.chunks = []
        self.done = threading.Event()
        self.first = threading.Event()
        self.gate = threading.Event()
        if not gate:
            self.gate.set()

    def __call__(self, chunk):
        self.chunks.append(chunk)
        self.first.set()
        if chunk.done:
            self.done.set()
        assert self.gate.wait(PATIENCE_S)

    def completion(self):
        assert self.done.wait(PATIENCE_S)
        assert [chunk.done for chunk in self.chunks] == [False] * (len(self.chunks) - 1) + [True]
        return self.chunks[-1].completion


def ask(worker, name, *, client=None, max_tokens=5, deadline=None, prompt=PROMPT, constraint=None):
    client = client or Client()
    sampling = SamplingParams(max_tokens=max_tokens, temperature=0.0, ignore_eos=True)
    worker.submit(Request(name, sampling, tokens=prompt, deadline=deadline, constraint=constraint), client)
    return client


def occupy(worker, name="busy"):
    """Submit a long request; return when the worker blocks at its first chunk."""
    client = ask(worker, name, client=Client(gate=True), max_tokens=400)
    assert client.first.wait(PATIENCE_S)
    return client
