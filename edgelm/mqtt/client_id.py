"""The client id of a board at its broker: the same after a restart, and not to be guessed.

Who connects with another's client id takes its place (MQTT 5.0, section 3.1.4): the broker ends the other connection.
So the id ends in random letters, which are kept between runs: the broker holds requests of QoS 1 for it meanwhile.
"""

from __future__ import annotations

import logging
import os
import re
import secrets
from pathlib import Path
from typing import Final

from edgelm.system.user_folders import user_folder

log = logging.getLogger(__name__)

RANDOM_BYTES: Final = 8
_KEPT: Final = re.compile(f"[0-9a-f]{{{2 * RANDOM_BYTES}}}")


def load_client_id(board: str, folder: Path | None = None) -> str:
    """Return a board's client id; one for this run alone where nothing can be kept.

    `folder` is where it is kept, by default the user's folder of states (XDG_STATE_HOME).
    """
    file = (user_folder("state") if folder is None else folder) / f"client-{board}"
    try:
        kept = file.read_text("ascii") if file.is_file() else ""
        if not _KEPT.fullmatch(kept):
            kept = secrets.token_hex(RANDOM_BYTES)
            file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            new = file.with_name(f".{file.name}-{os.getpid()}")
            with os.fdopen(os.open(new, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as stream:
                stream.write(kept)
            new.replace(file)
    except (OSError, ValueError) as error:
        log.debug("%s cannot be kept (%s): the broker keeps no requests over a restart", file, error)
        kept = secrets.token_hex(RANDOM_BYTES)
    return f"edgelm-{board}-{kept}"
