"""Uploads finished models to the Hugging Face hub."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from huggingface_hub import CommitOperationAdd, HfApi, get_token
from huggingface_hub.errors import HfHubHTTPError, HTTPError, OfflineModeIsEnabled

from qlora.errors import ResourceError


def push(files: Mapping[str, Path | bytes], *, repo: str, private: bool, message: str) -> str:
    """Uploads `files` (path in the repository: local file, or content) in one commit and returns its URL.

    The repository is created if there is none; files that it has already and that are not among `files` stay. Raises
    `ResourceError` without a login, without permission and without network.
    """
    if get_token() is None:
        raise ResourceError(f"repo={repo}: no access token is set; log in with `hf auth login`, or set HF_TOKEN")
    api = HfApi(library_name="qlora")
    operations = [CommitOperationAdd(path_in_repo=name, path_or_fileobj=file) for name, file in files.items()]
    try:
        api.create_repo(repo, private=private, exist_ok=True)
        return str(api.create_commit(repo, operations, commit_message=message).commit_url)
    except HfHubHTTPError as error:
        raise ResourceError(f"repo={repo}: {_refusal(error)}") from error
    except (HTTPError, OfflineModeIsEnabled, OSError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ResourceError(
            f"repo={repo}: {api.endpoint} cannot be reached ({reason}); check the network and HF_HUB_OFFLINE, and run "
            "the same command again"
        ) from error


def _refusal(error: HfHubHTTPError) -> str:
    status = error.response.status_code if error.response is not None else None
    if status == 401:
        return "the hub does not accept the access token; log in again with `hf auth login`, or correct HF_TOKEN"
    if status == 403:
        return "the access token may not write there; use a token with write access, or a repository of your own"
    said = error.server_message or " ".join(str(error).split())
    return f"the hub refused the upload ({said})"
