"""Downloads checkpoints from the Hugging Face hub, with advice if that fails.

Environment variables of its library: HF_ENDPOINT selects another hub, HF_TOKEN an account that has accepted a licence.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Final

from edgelm.errors import CheckpointError

HUB_ID: Final = re.compile(r"[\w.-]+/[\w.-]+")
"""owner/name, to be matched as a whole."""

FILES: Final = ["*.json", "*.safetensors", "*.jinja"]
"""Files that an export reads."""

UNREACHABLE: Final = {
    "ConnectError",
    "ConnectionError",
    "LocalEntryNotFoundError",
    "OfflineModeIsEnabled",
    "Timeout",
    "TimeoutException",
}
"""Error types of the library, of requests and of httpx for a hub that does not answer."""

OFFLINE_ADVICE: Final = "give it instead of the id"
"""What to do with a model's files that were copied here by other means."""


def download(
    hub_id: str, revision: str | None = None, folder: Path | None = None, *, offline_advice: str = OFFLINE_ADVICE
) -> Path:
    """Download a model's files; return their directory: in the library's cache, or `folder`.

    Existing files are not downloaded again; a partial download continues. `revision` is a commit, branch or tag.
    `offline_advice` ends the advice given if the hub does not answer. Raises `CheckpointError` with advice.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.utils import logging

    logging.set_verbosity_error()  # it would log every retry, over many lines
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
    """Return the commit of a revision, by default the newest. Raises `CheckpointError` as `download` does."""
    from huggingface_hub import HfApi

    try:
        return str(HfApi(endpoint=os.environ.get("HF_ENDPOINT")).model_info(hub_id, revision=revision, timeout=20).sha)
    except Exception as error:  # the library raises many unrelated types
        raise _refusal(error, hub_id, offline_advice) from error


def _refusal(error: Exception, hub_id: str, offline_advice: str) -> CheckpointError:
    reason = _reason(error, hub_id, offline_advice)
    return CheckpointError(f"{hub_id} is not on this machine and cannot be downloaded from the hub: {reason}")


def _reason(error: Exception, hub_id: str, offline_advice: str) -> str:
    """Return the cause and advice for an error of the library or of the libraries that it uses."""
    kinds = {kind.__name__ for kind in type(error).__mro__}
    if "GatedRepoError" in kinds:
        return (
            f"its licence must be accepted: do so at https://huggingface.co/{hub_id}, then set"
            " HF_TOKEN to a token of your account"
        )
    if "RevisionNotFoundError" in kinds:
        return "the revision does not exist"
    if "RepositoryNotFoundError" in kinds:
        return "the model does not exist, or it is private and HF_TOKEN is not set"
    if kinds & UNREACHABLE:
        return (
            f"the hub cannot be reached. On a machine with a network: hf download {hub_id} --local-dir model/;"
            f" then copy that folder here and {offline_advice}"
        )
    if isinstance(error, OSError) and error.errno is not None and error.filename is not None:
        return f"{error.filename}: {error.strerror}"  # a full disk, or a folder without write permission
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"
