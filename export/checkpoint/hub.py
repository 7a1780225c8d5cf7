"""Checkpoints of the Hugging Face hub: downloading one, and what to do where that fails.

Two variables of its library count: HF_ENDPOINT is another hub, HF_TOKEN an account that has accepted a licence.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Final

from edgelm.errors import CheckpointError

HUB_ID: Final = re.compile(r"[\w.-]+/[\w.-]+")
"""owner/name: a whole match."""

FILES: Final = ["*.json", "*.safetensors", "*.jinja"]
"""What an export reads."""

UNREACHABLE: Final = {
    "ConnectError",
    "ConnectionError",
    "LocalEntryNotFoundError",
    "OfflineModeIsEnabled",
    "Timeout",
    "TimeoutException",
}
"""Errors of the library, of requests and of httpx where the hub does not answer."""

OFFLINE_ADVICE: Final = "give it instead of the id"
"""What to do with a model's files once they came here another way."""


def download(
    hub_id: str, revision: str | None = None, folder: Path | None = None, *, offline_advice: str = OFFLINE_ADVICE
) -> Path:
    """Return where a model's files lie once they are fetched: the library's cache, or `folder`.

    What is there already is not fetched again; a broken download goes on where it was. `revision` is a commit, branch
    or tag; `offline_advice` ends the advice where the hub does not answer. Raises `CheckpointError`, with the remedy.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.utils import logging

    logging.set_verbosity_error()  # it would tell of every further try, over many lines
    try:
        return Path(
            snapshot_download(
                hub_id,
                revision=revision,
                local_dir=folder,
                allow_patterns=FILES,
                endpoint=os.environ.get("HF_ENDPOINT"),
            )
        )
    except Exception as error:  # the library raises many unrelated types
        raise _refusal(error, hub_id, offline_advice) from error


def resolve_commit(hub_id: str, revision: str | None = None, *, offline_advice: str = OFFLINE_ADVICE) -> str:
    """Return the commit that a revision, or the newest one, stands for. Raises `CheckpointError` as `download`."""
    from huggingface_hub import HfApi

    try:
        return str(HfApi(endpoint=os.environ.get("HF_ENDPOINT")).model_info(hub_id, revision=revision, timeout=20).sha)
    except Exception as error:  # the library raises many unrelated types
        raise _refusal(error, hub_id, offline_advice) from error


def _refusal(error: Exception, hub_id: str, offline_advice: str) -> CheckpointError:
    reason = _reason(error, hub_id, offline_advice)
    return CheckpointError(f"{hub_id} is not here, and cannot be fetched from the hub: {reason}")


def _reason(error: Exception, hub_id: str, offline_advice: str) -> str:
    """Return what was wrong and what helps, from an error of the library or of what it uses."""
    kinds = {kind.__name__ for kind in type(error).__mro__}
    if "GatedRepoError" in kinds:
        return (
            f"it asks for an account that has accepted its licence: do so at https://huggingface.co/{hub_id}, then set"
            " HF_TOKEN to a token of that account"
        )
    if "RevisionNotFoundError" in kinds:
        return "it has no such revision"
    if "RepositoryNotFoundError" in kinds:
        return "there is no such model, or it is private and HF_TOKEN is not set"
    if kinds & UNREACHABLE:
        return (
            f"there is no way to it from here. On a machine with a network: hf download {hub_id} --local-dir model/;"
            f" then copy that folder here and {offline_advice}"
        )
    if isinstance(error, OSError) and error.errno is not None and error.filename is not None:
        return f"{error.filename}: {error.strerror}"  # a full disk, a folder that cannot be written
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"
