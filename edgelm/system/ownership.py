"""Checks whether users other than this one and root could have changed a file. Knows nothing of the file's use.

The rules are those of OpenSSH for its own files (`safe_path`) with two additions: symbolic links are followed one by
one and each is checked like a folder, and a private group of this user counts as this user in the parent folders.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Final

MAX_LINKS: Final = 40
"""Symbolic links per path, as in Linux."""
PRIVATE_MODE: Final = 0o700
"""Mode of a folder for this user only."""
OTHERS_MAY_WRITE: Final = stat.S_IWGRP | stat.S_IWOTH


def find_path_fault(path: Path) -> str | None:
    """Return why users other than this one and root could replace the file at a path, or None.

    Checks every existing part of the path, from the root to the path itself, and the targets of symbolic links. A
    missing part has no fault. The text names the part and the fault.
    """
    for part, status, is_last in _walk(path):
        fault = _owner_fault(part, status)
        if fault is not None:
            return fault
        if stat.S_ISLNK(status.st_mode):
            continue  # the mode of a link has no meaning
        writable = status.st_mode & OTHERS_MAY_WRITE
        if not is_last and (status.st_mode & stat.S_ISVTX or (writable == stat.S_IWGRP and _is_private(part, status))):
            continue  # in a sticky folder only the owner can replace a file; the next part is checked for its owner
        if writable:
            return _mode_fault(part, status)
    return None


def find_content_fault(path: Path) -> str | None:
    """Return why users other than this one and root could have written a folder or its content, or None.

    The folder may contain only regular files and folders, no symbolic links. Call `find_path_fault` first: it ensures
    that others cannot change the content during this check. Raises `OSError` for an unreadable part.
    """
    waiting = [path]
    while waiting:
        here = waiting.pop()
        try:
            status = here.lstat()
        except FileNotFoundError:  # another process of this user removed it
            continue
        if stat.S_ISLNK(status.st_mode):
            return f"{here} is a symbolic link"
        fault = _owner_fault(here, status)
        if fault is None and status.st_mode & OTHERS_MAY_WRITE:
            fault = _mode_fault(here, status)
        if fault is not None:
            return fault
        if stat.S_ISDIR(status.st_mode):
            waiting += here.iterdir()
        elif not stat.S_ISREG(status.st_mode):
            return f"{here} is neither a file nor a folder"
    return None


def make_private(folder: Path) -> None:
    """Create a folder and its missing parents for this user only, independent of the umask.

    Raises `OSError` on failure.
    """
    if folder.is_dir():
        return
    if folder.parent != folder:
        make_private(folder.parent)
    try:
        folder.mkdir(PRIVATE_MODE)
    except FileExistsError:  # another process created it
        if not folder.is_dir():
            raise


def deny_others(file: Path) -> None:
    """Remove the write permission of group and others from a file of this user."""
    mode = stat.S_IMODE(file.stat().st_mode)
    if mode & OTHERS_MAY_WRITE:
        file.chmod(mode & ~OTHERS_MAY_WRITE)


def _walk(path: Path) -> Iterator[tuple[Path, os.stat_result, bool]]:
    """Yield (part, status, is last) of every existing part that the resolution of a path visits.

    Raises `OSError` for an unreadable part and for circular links.
    """
    here, left, links = Path("/"), list(reversed(path.absolute().parts[1:])), 0
    yield here, here.lstat(), not left
    while left:
        name = left.pop()
        if name == "..":
            here = here.parent
            continue
        part = here / name
        try:
            status = part.lstat()
        except (FileNotFoundError, NotADirectoryError):
            return
        if not stat.S_ISLNK(status.st_mode):
            here = part
            yield here, status, not left
            continue
        yield part, status, False
        links += 1
        if links > MAX_LINKS:
            raise OSError(f"{path} has too many symbolic links")
        target = part.readlink()
        if target.is_absolute():
            here = Path("/")
        left += reversed([name for name in target.parts if name != "/"])


def _owner_fault(path: Path, status: os.stat_result) -> str | None:
    if status.st_uid in (0, os.geteuid()):
        return None
    return f"{path} belongs to user {_user_name(status.st_uid)}"


def _mode_fault(path: Path, status: os.stat_result) -> str:
    who = "everyone" if status.st_mode & stat.S_IWOTH else "its group"
    return f"{who} may write {path} (mode {stat.S_IMODE(status.st_mode):04o})"


def _user_name(uid: int) -> str:
    import pwd

    try:
        return f"{uid} ({pwd.getpwuid(uid).pw_name})"
    except KeyError:
        return str(uid)


def _is_private(path: Path, status: os.stat_result) -> bool:
    """Whether the group of a file is this user's private group and no access control list adds other users."""
    import grp
    import pwd

    try:
        group, user = grp.getgrgid(status.st_gid), pwd.getpwuid(os.geteuid())
        named = hasattr(os, "listxattr") and "system.posix_acl_access" in os.listxattr(path)
    except (KeyError, OSError):
        return False
    return group.gr_name == user.pw_name and set(group.gr_mem) <= {user.pw_name} and not named
