"""The MQTT client id of a board: hard to guess, and the same after a restart.

A broker ends an existing connection when another client connects with the same id (MQTT 5.0, section 3.1.4), so the id
ends in random digits. They are stored between runs because the broker queues requests of QoS 1 for a known id.
"""

from __future__ import annotations

import logging
import re
import secrets
from pathlib import Path
from typing import Final

from edgelm.system.files import replace_file
from edgelm.system.user_folders import user_folder

log = logging.getLogger(__name__)

RANDOM_BYTES: Final = 8
_SUFFIX: Final = re.compile(f"[0-9a-f]{{{2 * RANDOM_BYTES}}}")


def load_client_id(board: str, folder: Path | None = None) -> str:
    """Return the board's client id. If it cannot be stored, the id is valid for this run only.

    `folder` holds the file with the random part, by default the user's state folder (XDG_STATE_HOME).
    """
    file = (user_folder("state") if folder is None else folder) / f"client-{board}"
    try:
        suffix = file.read_text("ascii") if file.is_file() else ""
        if not _SUFFIX.fullmatch(suffix):
            suffix = secrets.token_hex(RANDOM_BYTES)
            file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            replace_file(file, suffix, mode=0o600)
    except (OSError, ValueError) as error:
        log.debug("cannot store %s (%s): requests queued at the broker are lost at a restart", file, error)
        suffix = secrets.token_hex(RANDOM_BYTES)
    return f"edgelm-{board}-{suffix}"
