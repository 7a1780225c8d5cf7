"""Rules of the layout: imports between packages, libraries that stay unloaded, packaging, the architecture page."""

from __future__ import annotations

import ast
import importlib.util
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from edgelm.cli import COMMANDS, MODULES, main
from edgelm.cli.extras import find_extra

REPO = Path(__file__).resolve().parents[2]
PACKAGES = {"edgelm": "edgelm", "export": "edgelm_export", "devices": "edgelm_devices"}
FLOORS = [
    ["_version", "errors", "validation"],
    ["system", "types"],
    ["bundle"],
    ["graph", "text"],
    ["kernels", "sampling"],
    ["runtime"],
    ["engine"],
    ["model"],
    ["evaluation", "bench", "builtin"],
    ["mqtt"],
    ["edgelm_export"],
    ["edgelm_devices"],
    ["cli"],
    ["__init__", "__main__"],
]
"""Packages and top-level files of edgelm/, and the two packages beside it, lowest first."""
EXPORT_FLOORS = [
    ["progress_callback"],
    ["checkpoint"],
    ["architectures"],
    ["vocabulary"],
    ["quantize"],
    ["source_model", "graph", "options"],
    ["calibration"],
    ["verify", "write"],
    ["self_generated"],
    ["int8_kv"],
    ["plan", "optimum"],
    ["compare", "pipeline", "distill"],
    ["__init__"],
]
"""The same inside export/."""
SOLE_IMPORTERS = {
    "onnxruntime": {"edgelm/runtime/ort.py", "edgelm/runtime/runner.py"},
    "paho": {f"edgelm/mqtt/{name}.py" for name in ("connection", "paho_client", "paho_properties")},
    "llguidance": {"edgelm/text/constraint_compiler.py"},
    "tokenizers": {"edgelm/text/tokenizer.py"},
    "jinja2": {"edgelm/text/template_sandbox.py"},
    "amqtt": {"edgelm/mqtt/amqtt_broker.py"},
    "google": {"edgelm/graph/onnx_model.py"},
    "platformdirs": {"edgelm/system/user_folders.py"},
    "msgspec": {"edgelm/validation.py", "edgelm/mqtt/request_codec.py"},
}
HEAVY = {"onnx", "torch", "transformers", "optimum", "safetensors", "ml_dtypes", "huggingface_hub", "gguf"}
RUNTIME = {
    "numpy",
    "onnxruntime",
    "numba",
    "llvmlite",
    "tokenizers",
    "jinja2",
    "llguidance",
    "paho",
    "amqtt",  # belongs to an extra
    "google",  # google.protobuf
    "msgspec",
    "platformdirs",
    "tomllib",
    "tomli",
}


def sources(folder):
    return sorted(path.relative_to(REPO) for path in (REPO / folder).rglob("*.py"))


def module_of(path):
    """Return the module name of a file, as it is installed."""
    parts = [PACKAGES[path.parts[0]], *path.with_suffix("").parts[1:]]
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


OUR_MODULES = {module_of(path): path for folder in PACKAGES for path in sources(folder)}


def imports(path):
    """Return the absolute names that a file imports anywhere; `from a import b` is a.b."""
    package = module_of(path).split(".")
    if path.name != "__init__.py":
        package.pop()
    found = set()
    for node in ast.walk(ast.parse((REPO / path).read_text("utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) + 1 - node.level] if node.level else []
            base = ".".join([*above, *filter(None, [node.module])])
            found |= {f"{base}.{alias.name}" for alias in node.names}
    return found


def our_imports(path):
    """Return the files of edgelm, export and devices that a file imports."""
    named = {name if name in OUR_MODULES else name.rpartition(".")[0] for name in imports(path)}
    return {OUR_MODULES[name] for name in named if name in OUR_MODULES} - {path}


def edgelm_package_of(path):
    """Return the package or top-level file of edgelm/ of a file; export/ and devices/ are one package each."""
    return path.parts[1].removesuffix(".py") if path.parts[0] == "edgelm" else PACKAGES[path.parts[0]]


def export_package_of(path):
    return path.parts[1].removesuffix(".py")


def upward_imports(paths, package_of, floors):
    """Return (importer, imported) pairs that do not go to a lower floor; `__init__` may be imported from anywhere."""
    floor_of = {name: floor for floor, names in enumerate(floors) for name in names}
    return [
        (path.as_posix(), other.as_posix())
        for path in paths
        for other in our_imports(path)
        if other in paths and package_of(other) not in (package_of(path), "__init__")
        if floor_of[package_of(other)] >= floor_of[package_of(path)]
    ]


def import_cycles(paths):
    """Return sets of files that import each other in a cycle (Tarjan 1972, strongly connected components)."""
    number, lowest, stack, found = {}, {}, [], []

    def visit(path):
        number[path] = lowest[path] = len(number)
        stack.append(path)
        for other in our_imports(path) & paths:
            if other not in number:
                visit(other)
            if other in stack:
                lowest[path] = min(lowest[path], lowest[other])
        if lowest[path] == number[path]:
            ring = [stack.pop()]
            while ring[-1] != path:
                ring.append(stack.pop())
            if len(ring) > 1:
                found.append(sorted(each.as_posix() for each in ring))

    for path in sorted(paths):
        if path not in number:
            visit(path)
    return found


ALL_FILES = frozenset(OUR_MODULES.values())


def test_every_package_has_a_floor():
    assert {edgelm_package_of(path) for path in ALL_FILES} == {name for names in FLOORS for name in names}
    assert {export_package_of(path) for path in sources("export")} == {
        name for names in EXPORT_FLOORS for name in names
    }


def test_packages_import_only_from_lower_floors():
    assert not upward_imports(ALL_FILES, edgelm_package_of, FLOORS)
    assert not upward_imports(frozenset(sources("export")), export_package_of, EXPORT_FLOORS)


def test_no_files_import_each_other_in_a_cycle():
    init_files = {path for path in ALL_FILES if path in (Path("edgelm/__init__.py"), Path("export/__init__.py"))}
    assert not import_cycles(ALL_FILES - init_files)


def test_relative_imports_are_found():
    """A cycle of seven files was once not found because relative imports were ignored."""
    assert Path("export/options.py") in our_imports(Path("export/pipeline.py"))
    assert Path("export/graph/nodes.py") in our_imports(Path("export/graph/decoder_graph.py"))


def test_the_runtime_imports_no_other_library():
    for path in sources("edgelm"):
        others = {name.split(".")[0] for name in imports(path)} - set(sys.stdlib_module_names)
        assert others <= RUNTIME | {"edgelm"}, path


def test_no_two_files_share_a_name():
    """`cli` is an exception: its files have the names of commands."""
    names = [path.stem for path in ALL_FILES if path.stem != "__init__" and path.parts[1] != "cli"]
    assert not {name for name in names if names.count(name) > 1}


def test_devices_import_no_heavy_library():
    for path in sources("devices"):
        assert not {name.split(".")[0] for name in imports(path)} & HEAVY, path


def test_sole_importers():
    found = {library: set() for library in SOLE_IMPORTERS}
    for path in [*sources("edgelm"), *sources("devices")]:
        for library in {name.split(".")[0] for name in imports(path)} & set(found):
            found[library].add(path.as_posix())
    assert found == SOLE_IMPORTERS


def test_the_package_list_is_the_tree():
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        import tomli as tomllib
    settings = tomllib.loads((REPO / "pyproject.toml").read_text("utf-8"))["tool"]["setuptools"]
    assert settings["package-dir"] == {name: folder for folder, name in PACKAGES.items()}
    tree = {".".join([PACKAGES[path.parts[0]], *path.parts[1:-1]]) for folder in PACKAGES for path in sources(folder)}
    assert sorted(settings["packages"]) == sorted(tree)
    for folder in PACKAGES:
        assert (REPO / folder / "py.typed").is_file()


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(command, capsys):
    assert main([command, "--help"]) == 0
    printed = capsys.readouterr()
    assert printed.out.startswith(f"usage: edgelm {command}")
    assert printed.err == ""


def test_every_command_module_is_a_command():
    modules = {path.stem for path in sources("edgelm/cli") if "def add_arguments(" in (REPO / path).read_text("utf-8")}
    assert modules == {MODULES.get(name, name) for name in COMMANDS}


# --- libraries that stay unloaded, each in a process of its own ---


def python(code, *arguments):
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False, cwd=REPO)


def loaded_after(code, *arguments):
    """Return the top-level modules that are loaded after some code."""
    done = python(f"import sys\n{code}\nprint('LOADED', *sorted(sys.modules))", *arguments)
    assert done.returncode == 0, done.stderr
    line = next(line for line in done.stdout.splitlines() if line.startswith("LOADED"))
    return {name.split(".")[0] for name in line.split()[1:]}


def test_importing_edgelm_loads_no_library():
    loaded = loaded_after("import edgelm; edgelm.SamplingParams; edgelm.EdgelmError; edgelm.open_bundle")
    assert "edgelm" in loaded
    assert not loaded & (HEAVY | RUNTIME - {"tomllib"})


def test_help_loads_no_library():
    loaded = loaded_after("from edgelm.cli import main; main(['--help']); main(['--version'])")
    assert not loaded & (HEAVY | RUNTIME)


GENERATE = """
import edgelm
with edgelm.load(sys.argv[1], threads=1) as model:
    assert model.generate("Once upon", max_tokens=3, temperature=float(sys.argv[2]), ignore_eos=True, raw=True).tokens
"""


def test_greedy_decoding_does_not_load_numba(bundle):
    loaded = loaded_after(GENERATE, bundle, 0)
    assert "onnxruntime" in loaded
    assert not loaded & (HEAVY | {"numba", "paho", "llguidance", "jinja2"})
    assert "numba" in loaded_after(GENERATE, bundle, 1)


def test_a_start_from_the_board_cache_does_not_import_protobuf(tmp_path, monkeypatch):
    """protobuf takes time and memory to import; only the first start of a bundle reads its graph."""
    monkeypatch.setenv("EDGELM_CACHE_DIR", str(tmp_path))
    code = f"from edgelm.runtime import prepack\nprepack.MIN_CACHED_BYTES = 0\n{GENERATE}"
    already = "google" in loaded_after("import onnxruntime")
    assert "google" in loaded_after(code, "builtin", 0)
    assert ("google" in loaded_after(code, "builtin", 0)) is already


def test_the_builtin_bundle_is_loaded_without_protobuf():
    """Its graph is part of the package and is not checked; that of a copy is."""
    already = "google" in loaded_after("import onnxruntime")
    assert ("google" in loaded_after(GENERATE, "builtin", 0)) is already


def test_a_copy_of_the_builtin_bundle_is_checked(tmp_path):
    copy = shutil.copytree(REPO / "edgelm" / "builtin", tmp_path / "copy")
    assert "google" in loaded_after(GENERATE, copy, 0)


def test_exporting_a_known_architecture_loads_neither_torch_nor_transformers(tiny_checkpoint, tmp_path):
    code = "import edgelm_export\nedgelm_export.export(sys.argv[1], sys.argv[2])"
    loaded = loaded_after(code, tiny_checkpoint(), tmp_path / "out")
    assert {"onnx", "safetensors"} <= loaded
    assert not loaded & {"torch", "transformers", "optimum", "huggingface_hub"}


# --- a missing extra ---

WITHOUT = """
import sys
sys.modules[sys.argv[1]] = None
from edgelm.cli import main
sys.exit(main(sys.argv[2:]))
"""


@pytest.mark.parametrize(
    ("module", "extra", "arguments"),
    [
        ("onnx", "export", ["export", "checkpoint", "out"]),
        ("safetensors", "export", ["export", "checkpoint", "out"]),
        ("torch", "distill", ["distill", "--student", "tiny", "--data", "data.jsonl", "--out", "out"]),
        ("onnxruntime", "cpu", ["generate", "builtin", "hello"]),
        ("onnxruntime", "cpu", ["bench", "builtin"]),
    ],
    ids=["onnx", "safetensors", "torch", "onnxruntime-generate", "onnxruntime-bench"],
)
def test_a_missing_extra_is_named(module, extra, arguments):
    if arguments[0] in ("export", "distill"):
        needs = {"export": "onnx", "distill": "torch"}[arguments[0]]
        if importlib.util.find_spec(needs) is None:
            pytest.skip(f"{needs} is missing for real: pip install 'edgelm[all]'")
    done = python(WITHOUT, module, *arguments)
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr.startswith(f"edgelm {arguments[0]}: "), done.stderr
    assert done.stderr.count("\n") == 1, done.stderr
    assert re.search(rf"install (-e )?'[^']+\[{extra}\]'", done.stderr)
    assert repr(module) in done.stderr


def test_extras_are_read_from_the_packages_own_metadata():
    expected = {
        "onnxruntime": "cpu",
        "onnx": "export",
        "ml_dtypes": "export",
        "safetensors": "export",
        "huggingface_hub": "export",
        "torch": "distill",
        "transformers": "distill",
        "optimum": "optimum",
        "amqtt": "broker",
        "nonsense": None,
        "edgelm": None,
    }
    assert {module: find_extra(module) for module in expected} == expected


# --- the architecture page ---

ARCHITECTURE = (REPO / "edgelm/README.md").read_text("utf-8")


def test_the_architecture_page_names_every_package():
    tree = ARCHITECTURE.partition("```text")[2].partition("```")[0]
    packages = {path.parts[1] for folder in PACKAGES for path in sources(folder) if len(path.parts) > 2}
    assert not {name for name in packages if f"{name}/" not in tree}


def test_the_architecture_page_has_the_floors():
    rows = re.findall(r"^\| ([\d, ]+) \| (.*) \|$", ARCHITECTURE, re.MULTILINE)
    printed = {name for _, names in rows for name in re.findall(r"`(\w+)`", names)}
    assert printed == {name for names in FLOORS for name in names} - {"_version", "__init__", "__main__"}
    order = [name for _, names in rows for name in re.findall(r"`(\w+)`", names)]
    floor_of = {name: floor for floor, names in enumerate(FLOORS) for name in names}
    assert [floor_of[name] for name in order] == sorted(floor_of[name] for name in order)


def test_the_glossary_is_short_and_sorted():
    terms = re.findall(r"^\| ([\w ]+) \| ", ARCHITECTURE.partition("## Glossary")[2], re.MULTILINE)[1:]
    assert terms == sorted(terms, key=str.lower)
    assert 30 <= len(terms) <= 40
