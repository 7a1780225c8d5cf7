"""Bundles with a valid manifest and a hostile graph are refused with one error of one line.

Each case is one kind of attack; each is loaded with our kernels and without.
"""

from __future__ import annotations

import hashlib
import json
import shutil

import pytest

pytest.importorskip("onnx", reason="needs pip install 'edgelm[export]'")

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from edgelm.bundle.bundle_folder import open_bundle
from edgelm.bundle.manifest import MANIFEST
from edgelm.errors import BundleError
from edgelm.graph.graph_check import check_graph
from edgelm.runtime import prepack
from edgelm.runtime.prepack import open_verified
from edgelm.runtime.runner import open_runner
from edgelm.system.board_cache import BoardCache

BUILTIN = open_bundle("builtin", verify=False).path


class Hostile:
    """A copy of the built-in bundle with a graph that can be changed."""

    def __init__(self, folder):
        self.folder = folder / "hostile"
        self.folder.mkdir()
        for name in ("tokenizer.json", "model.onnx.data"):
            shutil.copy(BUILTIN / name, self.folder)
        self.model = onnx.load(BUILTIN / "model.onnx", load_external_data=False)
        self.manifest = json.loads((BUILTIN / MANIFEST).read_text("utf-8"))
        self.unlisted = set()

    def node(self, output):
        return next(node for node in self.model.graph.node if output in node.output)

    def tensor(self, name):
        return next(tensor for tensor in self.model.graph.initializer if tensor.name == name)

    def input(self, name):
        return next(value for value in self.model.graph.input if value.name == name)

    def store(self, name, array):
        self.model.graph.initializer.append(numpy_helper.from_array(np.asarray(array), name))
        return name

    def add(self, before, *nodes):
        place = list(self.model.graph.node).index(before)
        for node in reversed(nodes):
            self.model.graph.node.insert(place, node)

    def external(self, name, **entries):
        """Store a tensor's values in a file, with changed entries of external data; None removes an entry."""
        tensor = self.tensor(name)
        tensor.ClearField("raw_data")
        tensor.data_location = TensorProto.EXTERNAL
        known = {entry.key: entry.value for entry in tensor.external_data}
        known = {"location": "model.onnx.data", "offset": "0", "length": "768"} | known | entries
        del tensor.external_data[:]
        for key, value in known.items():
            if value is not None:
                tensor.external_data.add(key=key, value=str(value))

    def set(self, output, **attributes):
        for attribute in self.node(output).attribute:
            if attribute.name in attributes:
                attribute.i = attributes[attribute.name]

    def sealed(self):
        (self.folder / "model.onnx").write_bytes(self.model.SerializeToString())
        names = [
            file.name for file in self.folder.iterdir() if file.name not in self.unlisted and file.name != MANIFEST
        ]
        self.manifest["files"] = {
            name: {
                "bytes": (self.folder / name).stat().st_size,
                "sha256": hashlib.sha256((self.folder / name).read_bytes()).hexdigest(),
            }
            for name in names
        }
        (self.folder / MANIFEST).write_text(json.dumps(self.manifest), "utf-8")
        return self.folder


@pytest.fixture
def hostile(tmp_path):
    return Hostile(tmp_path)


def own_operator(case):
    node = case.node("layer.0.down.out")
    own = helper.make_node(
        "MatMulInt8Block128", [node.input[0]], ["layer.0.down.out", "scratch"], domain="edgelm",
        K=512, N=192, GATED=0, EPSILON=0, WEIGHTS=1 << 44, SCALES=1 << 44, BIAS=-1, NORM=-1,
    )  # fmt: skip
    case.add(node, own)
    case.model.graph.node.remove(node)


def own_operator_with_its_domain(case):
    own_operator(case)
    case.model.opset_import.append(helper.make_opsetid("edgelm", 1))


def own_attention(case):
    case.node("layer.0.attention.out").domain = "edgelm"


def foreign_domain(case):
    case.node("layer.0.down.out").domain = "evil"


def function(case):
    body = [helper.make_node("Identity", ["x"], ["y"])]
    case.model.functions.append(
        helper.make_function("com.microsoft", "QuickGelu", ["x"], ["y"], body, [helper.make_opsetid("", 18)])
    )


def unknown_operator(case):
    node = case.node("layer.0.down.out")
    case.store("times", np.array([1, 9, 1], np.int64))
    case.add(node, helper.make_node("Tile", [node.input[0], "times"], ["tiled"]))


def endless(case):
    body = helper.make_graph([helper.make_node("Identity", ["c"], ["d"])], "b", [], [])
    case.add(case.model.graph.node[0], helper.make_node("Loop", ["", "", ""], ["never"], body=body))


def body_with_a_file(case):
    inside = helper.make_tensor("w", TensorProto.FLOAT, [1], bytes(4), raw=True)
    inside.ClearField("raw_data")
    inside.data_location = TensorProto.EXTERNAL
    inside.external_data.add(key="location", value="/etc/hostname")
    case.add(case.model.graph.node[0], helper.make_node("Identity", [], ["read"], value=inside))


def two_of_a_name(case):
    case.model.graph.initializer.append(case.tensor("norm.layer.0.mlp"))


def undefined_name(case):
    case.node("layer.0.down.out").input[0] = "nothing"


def cos_short(case):
    for name in ("cos_cache", "sin_cache"):
        tensor = case.tensor(name)
        values = onnx.numpy_helper.to_array(tensor, str(BUILTIN))[:1].copy()
        tensor.CopyFrom(numpy_helper.from_array(values, name))


def sin_narrower(case):
    values = onnx.numpy_helper.to_array(case.tensor("sin_cache"), str(BUILTIN))[:, :-1].copy()
    case.tensor("sin_cache").CopyFrom(numpy_helper.from_array(values, "sin_cache"))


def positions_of_its_own(case):
    node = case.node("layer.0.attention.out")
    case.store("places", np.array([[1 << 40]], np.int64))
    node.input.extend([""] * (9 - len(node.input)) + ["places"])


def lengths_of_its_own(case):
    case.store("none", np.zeros(0, np.int32))
    case.node("layer.0.attention.out").input[5] = "none"


def past_of_its_own(case):
    case.store("small", np.zeros((1, 2, 1, 32), np.float32))
    case.node("layer.0.attention.out").input[4] = "small"


def past_of_another_layer(case):
    case.node("layer.0.attention.out").input[3] = "past.1.key"


def heads(case):
    case.set("layer.0.attention.out", num_heads=32, kv_num_heads=1)


def more_heads_than_numbers(case):
    case.set("layer.0.attention.out", num_heads=256)


def bias_short(case):
    node = case.node("layer.0.down.out")
    node.input.extend([""] * (5 - len(node.input)) + [case.store("bias", np.zeros(1, np.float32))])


def groups(case):
    node = case.node("layer.0.down.out")
    node.input.extend([""] * (4 - len(node.input)) + [case.store("groups", np.full(512, 9999, np.int32))])


def scales_short(case):
    case.store("few", np.ones(3, np.float32))
    case.node("layer.0.down.out").input[2] = "few"


def codes_short(case):
    case.store("few", np.ones((192, 4, 1), np.uint8))
    case.node("layer.0.down.out").input[1] = "few"


def codes_of_another_type(case):
    case.store("wide", np.ones((192, 4, 128), np.float32))
    case.node("layer.0.down.out").input[1] = "wide"


def columns_sliced(case):
    """A product with K = 512 that reads 4 columns."""
    node = case.node("layer.0.down.out")
    names = [case.store(name, np.array([value], np.int64)) for name, value in (("s", 0), ("e", 4), ("a", 2))]
    case.add(node, helper.make_node("Slice", [node.input[0], *names], ["narrow"]))
    node.input[0] = "narrow"


def columns_of_the_given_tokens(case):
    """The number of columns is the token id: right for some tokens and wrong for others."""
    node = case.node("layer.0.down.out")
    names = [
        case.store(name, np.array([value], np.int64)) for name, value in (("flat", -1), ("s", 0), ("e", 1), ("a", 2))
    ]
    case.add(
        node,
        helper.make_node("Reshape", ["input_ids", names[0]], ["ids"]),
        helper.make_node("Slice", ["ids", names[1], names[2]], ["first"]),
        helper.make_node("Slice", [node.input[0], names[1], "first", names[3]], ["narrow"]),
    )
    node.input[0] = "narrow"


def more_dimensions(case, count):
    node = case.node("layer.0.down.out")
    case.store("many", np.array([*[1] * count, -1, 512], np.int64))
    case.store("few", np.array([1, -1, 192], np.int64))
    case.add(node, helper.make_node("Reshape", [node.input[0], "many"], ["x.many"]))
    after = helper.make_node("Reshape", ["y.many", "few"], ["layer.0.down.out"])
    node.input[0], node.output[0] = "x.many", "y.many"
    case.model.graph.node.insert(list(case.model.graph.node).index(node) + 1, after)


def tokens_repeated(case):
    """More query tokens than positions in the KV cache: onnxruntime 1.23 writes beyond its end."""
    node = case.node("layer.5.attention.out")
    case.store("zeros", np.zeros(20_000, np.int64))
    case.add(node, helper.make_node("Gather", [node.input[0], "zeros"], ["many"], axis=1))
    node.input[0] = "many"


def out_of_order(case):
    node = case.node("layer.0.down.out")
    case.model.graph.node.remove(node)
    case.model.graph.node.append(node)


def rows_of_its_own(case):
    case.store("which", np.array([5], np.int64))
    next(node for node in case.model.graph.node if node.op_type == "Gather").input[1] = "which"


def shorter_table(case):
    node = next(node for node in case.model.graph.node if node.op_type == "GatherBlockQuantized")
    case.store("short", np.zeros((9, 96), np.uint8))
    case.store("scales", np.ones((9, 12), np.float32))
    node.input[0], node.input[2] = "short", "scales"


def norm_short(case):
    case.store("weight", np.ones(191, np.float32))
    next(node for node in case.model.graph.node if node.op_type == "SimplifiedLayerNormalization").input[1] = "weight"


def halves(case):
    node = next(node for node in case.model.graph.node if node.op_type == "Split")
    case.store("sizes", np.array([1, 1023], np.int64))
    node.input.append("sizes")
    del node.attribute[:]
    node.attribute.append(helper.make_attribute("axis", 0))


def sum_of_others(case):
    node = case.node("layer.0.down.out")
    case.add(node, helper.make_node("Add", [node.input[0], "layer.0.attention.out"], ["sum"]))


def number(**attributes):
    return lambda case: case.set("layer.0.down.out", **attributes)


def dims(*sizes):
    def change(case):
        tensor = case.tensor("layer.0.down.codes")
        del tensor.dims[:]
        tensor.dims.extend(sizes)

    return change


def place(**entries):
    return lambda case: case.external("layer.0.down.codes", **entries)


def norm_at(location):
    return lambda case: case.external("norm.layer.0.mlp", location=location)


def linked(case):
    (case.folder / "model.onnx.data").unlink()
    (case.folder / "model.onnx.data").symlink_to(BUILTIN / "model.onnx.data")


def unlisted(case):
    case.unlisted.add("model.onnx.data")


def in_the_manifest(**entries):
    return lambda case: case.manifest.update(entries)


def in_its_cache(**entries):
    return lambda case: case.manifest["cache"].update(entries)


def input_of_another_type(case):
    case.input("seqlens_k").type.tensor_type.elem_type = TensorProto.INT64


def input_more(case):
    case.model.graph.input.append(helper.make_tensor_value_info("more", TensorProto.FLOAT, [1]))


def no_logits(case):
    del case.model.graph.output[0]


def present_is_smaller(case):
    """As a value that attention does not compute."""
    node = case.node("layer.0.attention.out")
    node.output[1] = "other"
    case.store("present.0.key", np.zeros((1, 2, 1, 32), np.float32))


def marked_invariant(case):
    case.model.metadata_props.add(key="edgelm.invariant", value="1")


REFUSED = {
    "own operator": (own_operator, "'edgelm'"),
    "own operator with its domain": (own_operator_with_its_domain, "'edgelm'"),
    "own attention": (own_attention, "'edgelm'"),
    "foreign domain": (foreign_domain, "'evil'"),
    "function": (function, "functions"),
    "unknown operator": (unknown_operator, "'Tile'"),
    "endless": (endless, "Loop"),
    "an attribute's tensor in a file": (body_with_a_file, "'/etc/hostname'"),
    "duplicate name": (two_of_a_name, "'norm.layer.0.mlp'"),
    "undefined name": (undefined_name, "'nothing'"),
    "cos short": (cos_short, "rotary tables"),
    "sin narrower": (sin_narrower, "rotary tables"),
    "positions": (positions_of_its_own, "positions"),
    "lengths": (lengths_of_its_own, "seqlens_k"),
    "past of its own": (past_of_its_own, "'small'"),
    "past of another layer": (past_of_another_layer, "'past.1.key'"),
    "heads": (heads, "32 query heads and 1 KV heads"),
    "more heads than numbers": (more_heads_than_numbers, "256 query heads"),
    "bias short": (bias_short, "'bias'"),
    "groups": (groups, "inputs"),
    "scales short": (scales_short, "'few'"),
    "codes short": (codes_short, "'few'"),
    "codes of another type": (codes_of_another_type, "'wide'"),
    "K negative": (number(K=-(1 << 40)), f"K {-(1 << 40)}"),
    "N huge": (number(N=1 << 50), f"N {1 << 50}"),
    "no blocks": (number(block_size=0), "blocks of 0"),
    "bits": (number(bits=3), "3 bits"),
    "dimensions overflow": (dims(1 << 32, 1 << 32, 1), "bytes"),
    "a dimension is negative": (dims(192, -4, 128), "[192, -4, 128]"),
    "offset negative": (place(offset=-4096), "'-4096'"),
    "offset beyond": (place(offset=1 << 40), f"offset {1 << 40}"),
    "offset not a number": (place(offset="0x10"), "'0x10'"),
    "length another": (place(length=5), "5 bytes"),
    "no length": (place(length=None, offset=1 << 40), f"offset {1 << 40}"),
    "outside": (norm_at("../secret"), "'../secret'"),
    "absolute": (norm_at("/proc/self/environ"), "'/proc/self/environ'"),
    "another file": (norm_at("manifest.json"), "'manifest.json'"),
    "data behind a link": (linked, "model.onnx.data"),
    "data not listed": (unlisted, "model.onnx.data"),
    "vocabulary": (in_the_manifest(vocab_size=1000), "2048 logits"),
    "context": (in_the_manifest(context=1 << 20), "rotary tables"),
    "layers": (in_its_cache(layers=7), "no input past.6.key"),
    "fewer layers": (in_its_cache(layers=5), "unknown input past.5.key"),
    "head size": (in_its_cache(head_size=64), "[0, 2, 0, 64]"),
    "cache bits": (in_its_cache(bits=8), "type 1"),
    "input of another type": (input_of_another_type, "type 7"),
    "input more": (input_more, "unknown input more"),
    "no logits": (no_logits, "logits"),
    "marked as invariant": (marked_invariant, "edgelm.invariant"),
    "present is smaller": (present_is_smaller, "present.0.key"),
    "columns sliced": (columns_sliced, "Slice"),
    "9 dimensions": (lambda case: more_dimensions(case, 7), "'many'"),
    "400 dimensions": (lambda case: more_dimensions(case, 398), "'many'"),
    "5 dimensions": (lambda case: more_dimensions(case, 3), "Reshape"),
    "columns of the tokens": (columns_of_the_given_tokens, "Reshape"),
    "tokens repeated": (tokens_repeated, "Gather"),
    "tokens out of order": (out_of_order, "'layer.0.down.out'"),
    "rows of its own": (rows_of_its_own, "'which'"),
    "a shorter table": (shorter_table, "[9, 96]"),
    "weights of a norm": (norm_short, "[191]"),
    "halves of another size": (halves, "Split"),
    "a sum of others": (sum_of_others, "Add"),
}


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """Kernels compiled once for all formats of the built-in bundle."""
    from edgelm.kernels.compiler import main

    file = tmp_path_factory.mktemp("kernels") / "kernels.so"
    assert main([str(file), "4:16", "4:32", "4:64", "4:128", "8:16", "8:32", "8:64", "8:128"]) is None
    return file


@pytest.fixture(params=["kernels", "onnxruntime"])
def cache(request, tmp_path, monkeypatch, compiled):
    monkeypatch.setattr(prepack, "MIN_CACHED_BYTES", 0)
    monkeypatch.setattr(prepack, "_compile", lambda library, _formats: shutil.copy(compiled, library))
    return BoardCache(tmp_path / "cache") if request.param == "kernels" else None


def logits_of(path, cache):
    runner = open_runner(open_verified(path, cache), rows=1, threads=1, cache=cache)
    first = runner.prefill(0, np.arange(2, 9), 0).copy()
    return np.concatenate([first, runner.decode(np.array([3]), np.array([7], np.int32))])


@pytest.mark.parametrize("kind", REFUSED)
def test_hostile_graphs_are_refused(hostile, cache, kind):
    change, words = REFUSED[kind]
    change(hostile)
    with pytest.raises(BundleError) as caught:
        logits_of(hostile.sealed(), cache)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_unchanged_bundle_is_accepted(hostile, cache):
    assert logits_of(hostile.sealed(), cache).shape == (2, 2048)


def test_any_bytes_in_place_of_a_graph_are_refused(tmp_path, hostile):
    graph = hostile.sealed() / "model.onnx"
    whole = graph.read_bytes()
    rng = np.random.default_rng(0)
    cases = [
        b"",
        b"\0",
        b"\xff" * 1000,
        b"\x3a" + b"\xff" * 100_000,
        whole[:1000],
        bytes(rng.integers(0, 256, 5000, np.uint8)),
    ]
    for content in cases:
        graph.write_bytes(content)
        hostile.model = type("Raw", (), {"SerializeToString": lambda _, content=content: content})()
        with pytest.raises(BundleError, match=str(graph)):
            check_graph(open_bundle(hostile.sealed()))
