"""Board profiles are validated strictly, and boards are detected from Linux's files."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest
from edgelm_devices.board_profile import PROFILES, BoardProfile, load_profile, load_profiles, read_profile
from edgelm_devices.detect import detect_board
from edgelm_devices.emulate import write_board_files
from edgelm_devices.rootfs import WHEELS
from hypothesis import assume, given
from hypothesis import strategies as st

from edgelm.cli import main
from edgelm.errors import DeviceError
from edgelm.system.sensors import read_temperature, read_throttling

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

EMULATED = [profile for profile in load_profiles().values() if profile.emulation]

# From a Raspberry Pi 5.
CORE = """processor\t: {}
BogoMIPS\t: 108.00
Features\t: fp asimd evtstrm aes pmull sha1 sha2 crc32 atomics fphp asimdhp cpuid asimdrdm lrcpc dcpop asimddp
CPU implementer\t: 0x41
CPU architecture: 8
CPU variant\t: 0x4
CPU part\t: 0xd0b
CPU revision\t: 1

"""
PI5 = (
    "".join(CORE.format(core) for core in range(4)) + "Revision\t: d04170\nModel\t\t: Raspberry Pi 5 Model B Rev 1.0\n"
)


@pytest.fixture
def machine(tmp_path: Path):
    """Return a function that writes files to a root file system and returns its folder."""

    def write(**files: str) -> Path:
        for name, text in files.items():
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        return tmp_path

    return write


def test_every_profile_has_the_name_of_its_file():
    assert {path.stem for path in PROFILES.glob("*.toml")} == set(load_profiles())
    assert {"pi4", "pi5", "orin-nano", "x86-64"} <= set(load_profiles())


@pytest.mark.parametrize("profile", EMULATED, ids=lambda profile: profile.name)
def test_the_figures_of_a_profile_are_plausible(profile: BoardProfile):
    assert profile.cpu
    assert profile.memory
    assert 1 <= profile.cpu.threads <= profile.cpu.cores
    assert 5 < profile.memory.bandwidth_gb_s < 210
    assert {"fp", "asimd", "crc32"} <= set(profile.cpu.features)
    if "asimddp" in profile.cpu.features:  # the dot product came with ARMv8.2, like half-precision arithmetic
        assert {"atomics", "asimdhp"} <= set(profile.cpu.features)


def test_only_newer_boards_have_the_dot_product():
    have = {profile.name for profile in EMULATED if "asimddp" in profile.cpu.features}
    assert {"pi5", "orin-nano"} <= have
    assert "pi4" not in have


KEYS = st.text(st.characters(codec="ascii", categories=["Ll"]), min_size=1, max_size=12)


@given(key=KEYS, table=st.sampled_from(["", "match", "cpu", "memory", "emulation"]), value=st.integers())
def test_an_unknown_key_is_refused_by_name(tmp_path_factory, key, table, value):
    known = {"name", "title", "match", "machine", "implementer", "part", "cpu", "core", "cores", "features", "threads"}
    assume(key not in {*known, "memory", "emulation"})
    text = (PROFILES / "pi5.toml").read_text()
    header = f"[{table}]\n" if table else 'name = "pi5"\n'
    path = tmp_path_factory.getbasetemp() / "unknown.toml"
    path.write_text(text.replace(header, f"{header}{key} = {value}\n"))
    with pytest.raises(DeviceError, match=rf"unknown\.toml.*\b{key}\b"):
        read_profile(path)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("cores = 4", 'cores = "4"', r"cpu\.cores.*'4'"),
        ("cores = 4", "cores = true", r"cpu\.cores.*True"),
        ("sizes_gb = [1, 2, 4, 8, 16]", "sizes_gb = 8", r"memory\.sizes_gb.*list.*8"),
        ("sizes_gb = [1,", "sizes_gb = [0.5,", r"memory\.sizes_gb\[0\].*0\.5"),
        ("bandwidth_gb_s = 17.1", "bandwidth_gb_s = false", r"memory\.bandwidth_gb_s.*False"),
        ('title = "Raspberry Pi 5"', "", r"\btitle\b"),
        ('machine = "aarch64"', "", r"match\.machine"),
        ("[cpu]", "[cpu", "TOML"),
        ("cores = 4", "cores = " + "[" * 5000 + "]" * 5000, "TOML"),
        ("cores = 4", "cores = 0x" + "f" * 10_000, r"cpu\.cores.*60 digits"),
    ],
)
def test_a_wrong_profile_is_one_clear_error(tmp_path: Path, old: str, new: str, message: str):
    text = (PROFILES / "pi5.toml").read_text()
    assert old in text
    path = tmp_path / "mine.toml"
    path.write_text(text.replace(old, new))
    with pytest.raises(DeviceError, match=rf"mine\.toml.*{message}"):
        load_profile(str(path))


def test_a_section_must_be_a_table(tmp_path: Path):
    path = tmp_path / "mine.toml"
    path.write_text('name = "mine"\ntitle = "Mine"\nmatch = 1\n')
    with pytest.raises(DeviceError, match=r"mine\.toml.*match.*table.*1"):
        read_profile(path)


def test_an_integer_bandwidth_is_accepted(tmp_path: Path):
    path = tmp_path / "mine.toml"
    path.write_text((PROFILES / "pi5.toml").read_text().replace("bandwidth_gb_s = 17.1", "bandwidth_gb_s = 17"))
    assert read_profile(path).memory.bandwidth_gb_s == 17.0


def test_an_unknown_board_is_refused_with_the_known_ones():
    with pytest.raises(DeviceError, match=r"'pi6'.*pi4, pi5"):
        load_profile("pi6")


@pytest.mark.parametrize(
    ("model", "name"),
    [
        ("Raspberry Pi 5 Model B Rev 1.0", "pi5"),
        ("Raspberry Pi 500 Rev 1.0", "pi5"),
        ("Raspberry Pi Compute Module 5 Rev 1.0", "pi5"),
        ("Raspberry Pi 4 Model B Rev 1.5", "pi4"),
        ("Raspberry Pi 400 Rev 1.0", "pi4"),
        ("NVIDIA Jetson Orin Nano Engineering Reference Developer Kit Super", "orin-nano"),
        ("NVIDIA Jetson Orin Nano Developer Kit", "orin-nano"),
    ],
)
def test_a_board_is_detected_by_its_device_tree(machine, model: str, name: str):
    board = detect_board(machine(**{"proc/device-tree/model": model + "\0"}), machine="aarch64")
    assert (board.profile.name, board.matched_by, board.model) == (name, "device tree", model)


def test_a_model_with_a_longer_number_does_not_match(machine):
    board = detect_board(machine(**{"proc/device-tree/model": "Raspberry Pi 51 Model B\0"}), machine="aarch64")
    assert (board.profile, board.model) == (None, "Raspberry Pi 51 Model B")


def test_an_unknown_board_is_matched_by_its_processor(machine):
    root = machine(**{"proc/device-tree/model": "Some Other Board\0", "proc/cpuinfo": PI5})
    board = detect_board(root, machine="aarch64")
    assert (board.profile.name, board.matched_by) == ("pi5", "processor")
    assert (board.cores, board.implementer, board.part) == (4, "0x41", "0xd0b")
    assert board.features == board.profile.cpu.features


def test_without_files_nothing_is_known(tmp_path: Path):
    board = detect_board(tmp_path, machine="riscv64")
    assert (board.profile, board.matched_by, board.model, board.memory_bytes) == (None, None, None, None)
    assert (board.temperature_c, board.throttling, board.cores) == (None, None, 1)


def test_any_other_computer_is_matched_by_its_architecture(tmp_path: Path):
    board = detect_board(tmp_path, machine="x86_64")
    assert (board.profile.name, board.matched_by) == ("x86-64", "machine")


@pytest.mark.parametrize("profile", EMULATED, ids=lambda profile: profile.name)
def test_an_emulated_board_is_detected_as_its_board(tmp_path: Path, profile: BoardProfile):
    (tmp_path / "unpacked" / "usr").mkdir(parents=True)
    write_board_files(tmp_path / "root", tmp_path / "unpacked", profile, profile.cpu, profile.emulation)
    board = detect_board(tmp_path / "root", machine="aarch64")
    assert (board.profile, board.matched_by) == (profile, "device tree")
    assert (board.cores, board.features) == (profile.cpu.cores, profile.cpu.features)
    assert board.part == profile.emulation.part
    assert (board.memory_bytes, board.temperature_c) == (None, None)
    assert (tmp_path / "root/usr").is_dir()


def test_memory_is_read_in_bytes(machine):
    board = detect_board(machine(**{"proc/meminfo": "MemTotal:        8245220 kB\nMemAvailable:    7016032 kB\n"}))
    assert (board.memory_bytes, board.memory_available_bytes) == (8245220 * 1024, 7016032 * 1024)


def test_the_highest_processor_temperature_is_returned(machine):
    sensors = {"cpu-thermal": 51550, "soc0-thermal": 53000, "gpu-thermal": -256000, "pmic": 99000}
    files = {}
    for number, (kind, reading) in enumerate(sensors.items()):
        zone = f"sys/class/thermal/thermal_zone{number}"
        files |= {f"{zone}/type": f"{kind}\n", f"{zone}/temp": f"{reading}\n"}
    root = machine(**files)
    assert read_temperature(root) == 53.0


def test_a_sensor_that_is_off_is_ignored(machine):
    zone = "sys/class/thermal/thermal_zone0"
    assert read_temperature(machine(**{f"{zone}/type": "gpu-thermal\n", f"{zone}/temp": "-256000\n"})) is None


def test_other_sensors_are_used_without_processor_sensors(machine):
    zone = "sys/class/thermal/thermal_zone0"
    root = machine(**{f"{zone}/type": "acpitz\n", f"{zone}/temp": "40000\n"})
    assert read_temperature(root) == 40.0


NODES = st.sampled_from(["soc", "soc@107c000000"])  # Raspberry Pi 4 and older; Raspberry Pi 5


@given(now=st.integers(0, 15), before=st.integers(0, 15), node=NODES)
def test_throttling_bits_are_decoded(tmp_path_factory, now: int, before: int, node: str):
    root = tmp_path_factory.getbasetemp() / node
    path = root / "sys/devices/platform" / node / f"{node}:firmware" / "get_throttled"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"{now | before << 16:x}\n")
    found = read_throttling(root)
    assert found is not None
    assert (len(found.now), len(found.since_boot)) == (now.bit_count(), before.bit_count())
    assert ("under-voltage" in found.now) == bool(now & 1)
    assert ("throttled" in found.since_boot) == bool(before & 4)


def test_list_and_detect_print_one_json_object(capsys):
    assert main(["devices", "list", "--json"]) == 0
    boards = json.loads(capsys.readouterr().out)["boards"]
    assert {board["name"] for board in boards} == set(load_profiles())
    assert main(["devices", "detect", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["cores"] >= 1
    assert main(["devices", "detect"]) == 0
    assert f"{found['cores']} x" in capsys.readouterr().out


def test_a_generic_computer_cannot_be_emulated(capsys):
    assert main(["devices", "emulate", "x86-64"]) == 1
    out, err = capsys.readouterr()
    assert not out
    assert "x86-64" in err
    assert err.count("\n") == 1


def test_an_emulated_board_has_every_dependency_of_greedy_decoding():
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text("utf-8"))["project"]
    names = {re.match(r"[\w-]+", line)[0] for line in project["dependencies"]}
    assert names - {"llvmlite", "numba", "tomli"} <= set(WHEELS)
