"""The house's rules that a machine can check: who imports whom, what stays unloaded, what is packaged."""

from __future__ import annotations

import ast
import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest

from edgelm.cli import COMMANDS, MODULES, main
from edgelm.cli.extras import extra_of

REPO = Path(__file__).resolve().parents[2]
FLOORS = [
    {"background", "installed", "terminal", "tokenbytes", "turns"},
    {
        "_version",
        "child",
        "errors",
        "fields",
        "folders",
        "marked",
        "ownership",
        "protobuf",
        "textfile",
        "tokenizerfile",
    },
    {"attributes", "brokerconfig", "catalogue", "messages"},
    {"store"},
    {"bundle", "config", "tasks", "measure", "hardware", "divergence", "windows"},
    {"boardcache", "native", "templates"},
    {"chat", "detokenizer", "drafts", "grammar", "kv", "memory", "prefixes", "profile", "repetition", "sampling"},
    {"tuning", "tokenizer", "growing", "trial"},
    {"graphs", "static_tokens", "constraints", "conversations"},
    {"probe"},
    {"graph_shapes"},
    {"graph_check"},
    {"weights"},
    {"session"},
    {"sequence", "static_prefix"},
    {"reuse", "intake", "rows", "scoring"},
    {"engine"},
    {"worker"},
    {"model"},
    {"evaluation", "benchmark", "tuner"},
    {"profiler"},
    {"mqtt"},
    {"cli"},
]
"""Rooms of edgelm/, lowest first: a room imports only from floors below its own, and within itself."""
FLOOR_OF = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}
SOLE_IMPORTERS = {
    "onnxruntime": {"edgelm/runtime/ort.py", "edgelm/runtime/runner.py"},
    "paho": {f"edgelm/mqtt/{name}.py" for name in ("client", "properties", "sending", "transport")},
    "llguidance": {"edgelm/text/grammar.py"},
    "tokenizers": {"edgelm/text/tokenizer.py"},
    "jinja2": {"edgelm/text/template_sandbox.py"},
    "amqtt": {"edgelm/mqtt/embedded_broker.py"},
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
    "amqtt",  # of an extra, and imported only by name
    "tomllib",
    "tomli",
}
PACKAGES = {"edgelm": "edgelm", "export": "edgelm_export", "devices": "edgelm_devices"}
RECIPES = {"export/distill/builtin_recipe.py"}
"""Run with python -m: commands in all but name, so they may use what commands share."""


def sources(folder):
    return sorted(path.relative_to(REPO) for path in (REPO / folder).rglob("*.py"))


def imports(path):
    """Absolute names that a file imports, wherever in it; `from edgelm import x` counts as edgelm.x."""
    found = set()
    for node in ast.walk(ast.parse((REPO / path).read_text("utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def rooms(path):
    """Rooms of edgelm that a file imports; the package itself stands for its public names."""
    parts = [name.split(".") for name in imports(path) if name.split(".")[0] == "edgelm"]
    return {name[1] for name in parts if len(name) > 1 and name[1] in FLOOR_OF}


def test_every_room_has_a_floor():
    found = {path.parts[1].removesuffix(".py") for path in sources("edgelm")}
    assert found - {"__init__", "__main__", "builtin"} == set(FLOOR_OF)


@pytest.mark.parametrize("path", sources("edgelm"), ids=str)
def test_rooms_import_from_floors_below(path):
    room = path.parts[1].removesuffix(".py")
    if room in ("__init__", "__main__", "builtin"):
        return
    allowed = {other for other, floor in FLOOR_OF.items() if floor < FLOOR_OF[room]} | {room}
    assert rooms(path) <= allowed
    assert {name.split(".")[0] for name in imports(path)} <= RUNTIME | {"edgelm"} | set(sys.stdlib_module_names)


@pytest.mark.parametrize(
    ("folder", "top"),
    [("export", "static_prefix"), ("devices", "mqtt")],
    ids=["export-below-engine", "devices-below-cli"],
)
def test_the_other_packages_stay_below_their_floor(folder, top):
    for path in sources(folder):
        if path.as_posix() in RECIPES:
            continue
        above = {room for room in rooms(path) if FLOOR_OF[room] > FLOOR_OF[top]}
        assert not above, f"{path} imports {above}"


def test_devices_need_no_heavy_library():
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


# --- what stays unloaded, each in a process of its own ---


def python(code, *arguments):
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False, cwd=REPO)


def loaded_after(code, *arguments):
    """Top-level modules loaded after some code has run."""
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


def test_greedy_answers_do_not_wait_for_numba(bundle):
    loaded = loaded_after(GENERATE, bundle, 0)
    assert "onnxruntime" in loaded
    assert not loaded & (HEAVY | {"numba", "paho", "llguidance", "jinja2"})
    assert "numba" in loaded_after(GENERATE, bundle, 1)


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
    assert re.search(rf"install (-e )?'[^']+\[{extra}\]'", done.stderr), "whatever it was installed from"
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
    assert {module: extra_of(module) for module in expected} == expected
