"""`edgelm devices emulate` on a root that is already there: the tokens of an emulated arm64 processor at fp32.

The root is fetched over the network, so not by the tests: `edgelm devices emulate pi5` does it once, as CI does.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from edgelm_devices import rootfs
from edgelm_devices.board_profile import PROFILES, load_profile
from edgelm_devices.emulate import default_cache_folder, emulate

import edgelm
from edgelm.cli import main
from edgelm.errors import DeviceError

UBUNTU = {"ID": "ubuntu", "VERSION_CODENAME": "noble", "PRETTY_NAME": "Ubuntu 24.04"}


@pytest.fixture(scope="module")
def cache() -> Path:
    """The cache of emulated roots, where this machine has one."""
    if not (shutil.which("qemu-aarch64-static") or shutil.which("qemu-aarch64")):
        pytest.skip("emulation needs QEMU: apt-get install qemu-user-static")
    try:
        folder = rootfs.rootfs_folder(default_cache_folder())
    except DeviceError as error:
        pytest.skip(str(error))
    if not folder.is_dir():
        pytest.skip(f"{folder} is absent: `edgelm devices emulate pi5` fetches it")
    return default_cache_folder()


@pytest.mark.parametrize("name", ["pi4", "pi5"])
def test_the_same_tokens_at_fp32(cache: Path, tiny_checkpoint, export_to_cache, name: str):
    bundle = export_to_cache(tiny_checkpoint(), quant="fp32")
    result = emulate(load_profile(name), str(bundle), prompt="Once upon a time", cache=cache, on_status=print)
    assert result.emulated["tokens"] == result.host["tokens"] != []
    assert result.emulated["board"]["profile"] == name
    assert result.emulated["board"]["machine"] == "aarch64"
    assert result.emulated["board"]["memory_bytes"] is None  # unknown: the host's memory is not the board's
    assert result.ok
    assert result.verdict[0] == "ok"


def test_the_same_tokens_on_a_real_model(cache: Path, stories_bundle, capsys):
    bundle = stories_bundle("fp32")
    arguments = ["--bundle", str(bundle), "--prompt", "Once upon a time"]
    assert main(["devices", "emulate", "pi5", *arguments, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    with edgelm.load(bundle) as model:
        answer = model.generate("Once upon a time", max_tokens=64, temperature=0.0)
    assert result["same_tokens"]
    assert result["emulated"]["tokens"] == list(answer.tokens)


def test_a_processor_that_qemu_does_not_know_is_one_error(cache: Path, bundle: Path, tmp_path: Path, capsys):
    profile = tmp_path / "mine.toml"
    profile.write_text((PROFILES / "pi5.toml").read_text().replace("cortex-a76", "cortex-z99"))
    assert main(["devices", "emulate", str(profile), "--bundle", str(bundle)]) == 1
    out, err = capsys.readouterr()
    assert not out
    assert "the smoke test on the emulated board" in err


def test_a_missing_bundle_is_one_error(cache: Path, capsys):
    assert main(["devices", "emulate", "pi5", "--bundle", "no/such/bundle"]) == 1
    out = capsys.readouterr().out
    assert "FAILED" in out
    assert "no/such/bundle" in out


def test_without_qemu_the_error_names_the_package(tmp_path: Path, monkeypatch, capsys):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert main(["devices", "emulate", "pi5"]) == 1
    assert "apt-get install qemu-user-static" in capsys.readouterr().err


def test_other_systems_than_debian_are_refused(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(rootfs.platform, "freedesktop_os_release", lambda: UBUNTU)
    with pytest.raises(DeviceError, match=r"Debian.*found Ubuntu 24\.04"):
        rootfs.prepare_rootfs(tmp_path, print)
    assert not list(tmp_path.iterdir())


def test_a_failed_fetch_leaves_nothing(tmp_path: Path, monkeypatch):
    """apt without any source, as without a network."""
    if not shutil.which("apt-get"):
        pytest.skip("this is not Debian")
    monkeypatch.setattr(rootfs, "_read_codename", lambda: "bookworm")
    (tmp_path / "apt.conf").write_text('Dir::Etc::sourcelist "/dev/null";\nDir::Etc::sourceparts "-";\n')
    monkeypatch.setenv("APT_CONFIG", str(tmp_path / "apt.conf"))
    with pytest.raises(DeviceError, match=r"arm64 packages with apt .* failed: E: "):
        rootfs.prepare_rootfs(tmp_path / "cache", print)
    assert not list((tmp_path / "cache").iterdir())


def test_a_root_is_published_once(tmp_path: Path):
    """Of two runs that fetch at the same time, the quicker wins and the other uses its root."""
    made, folder = tmp_path / "made", tmp_path / "folder"
    for place in (made, folder):
        place.mkdir()
        (place / "by").write_text(place.name)
    rootfs._rename_into_place(made, folder)
    assert (folder / "by").read_text() == "folder"
