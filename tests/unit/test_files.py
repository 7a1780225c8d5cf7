"""Files that are replaced as a whole, and TOML files."""

from __future__ import annotations

import os
import stat

import pytest

from edgelm.system.files import read_toml, replace_file


def test_a_file_is_replaced_with_its_permissions(tmp_path):
    file = tmp_path / "file"
    umask = os.umask(0)
    try:
        replace_file(file, "é", mode=0o600)
        assert stat.S_IMODE(file.stat().st_mode) == 0o600
        replace_file(file, "two")
        assert stat.S_IMODE(file.stat().st_mode) == 0o644
    finally:
        os.umask(umask)
    assert file.read_text("utf-8") == "two"
    assert list(tmp_path.iterdir()) == [file]


@pytest.mark.parametrize("text", [b"a = ", b"\xff", b"a = " + b"[" * 5000 + b"]" * 5000, b"a = " + b"9" * 10_000])
def test_what_is_not_toml_is_one_error(text, tmp_path):
    file = tmp_path / "file.toml"
    file.write_bytes(text)
    with pytest.raises(ValueError, match=r".+"):
        read_toml(file)
