"""Who could have changed a file: this user and root alone, or others too. Knows nothing of what the file is for.

The rules are those of ssh for its own files (OpenSSH's `safe_path`), with two additions: symbolic links are followed
one by one, each judged like a folder, and a private group of this user counts as this user in the folders above.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Final

MAX_LINKS: Final = 40
"""As many symbolic links in one path as Linux follows."""
PRIVATE: Final = 0o700
"""Mode of a folder that is made for this user alone."""
OTHERS_MAY_WRITE: Final = stat.S_IWGRP | stat.S_IWOTH


def find_path_fault(path: Path) -> str | None:
    """Return why others than this user and root could exchange what lies at a path; None where they could not.

    Every existing part of the path is judged, from the root to the path itself, and all that symbolic links in it lead
    to. What does not exist has no fault. The text names the part and what is wrong with it.
    """
    for part, status, is_last in _walk(path):
        fault = _owner_fault(part, status)
        if fault is not None:
            return fault
        if stat.S_ISLNK(status.st_mode):
            continue  # the mode of a link says nothing
        writable = status.st_mode & OTHERS_MAY_WRITE
        if not is_last and (status.st_mode & stat.S_ISVTX or (writable == stat.S_IWGRP and _is_private(part, status))):
            continue  # what lies in a sticky folder is its owner's, whom the next part shows
        if writable:
            return _mode_fault(part, status)
    return None


def find_content_fault(path: Path) -> str | None:
    """Return why others could have written a folder or something in it; None where they could not.

    Nothing in it may be a symbolic link, or anything but a file or a folder. Call `find_path_fault` first, so that
    nothing
    changes meanwhile. Raises `OSError` for what cannot be looked at.
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
    """Make a folder, and those above it that are missing, for this user alone, whatever the umask allows.

    Raises `OSError` where that cannot be.
    """
    if folder.is_dir():
        return
    if folder.parent != folder:
        make_private(folder.parent)
    try:
        folder.mkdir(PRIVATE)
    except FileExistsError:  # another process was quicker
        if not folder.is_dir():
            raise


def deny_others(file: Path) -> None:
    """Take from a file of this user what an open umask gave to others: writing."""
    mode = stat.S_IMODE(file.stat().st_mode)
    if mode & OTHERS_MAY_WRITE:
        file.chmod(mode & ~OTHERS_MAY_WRITE)


def _walk(path: Path) -> Iterator[tuple[Path, os.stat_result, bool]]:
    """Yield every existing part of a path that looking it up passes through, and whether it is where the path ends.

    Raises `OSError` for what cannot be looked at, and for links that lead round in a circle.
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
    """Whether a group is one that a system with private groups made for this user, and no access list adds others."""
    import grp
    import pwd

    try:
        group, user = grp.getgrgid(status.st_gid), pwd.getpwuid(os.geteuid())
        named = hasattr(os, "listxattr") and "system.posix_acl_access" in os.listxattr(path)
    except (KeyError, OSError):
        return False
    return group.gr_name == user.pw_name and set(group.gr_mem) <= {user.pw_name} and not named
