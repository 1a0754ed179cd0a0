"""Repositories of the Hugging Face hub; cache, progress and resuming are those of huggingface_hub."""

from __future__ import annotations

import re
from pathlib import Path

from huggingface_hub import constants, hf_hub_download, snapshot_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
)

from tokdyn.bases.download import Unreachable, digest
from tokdyn.checkpoints.files import PICKLED
from tokdyn.errors import CheckpointError

ID = re.compile(r"(?P<repo>[\w.-]+/[\w.-]+?)(?::(?P<inside>[^:]+))?")
_ENDINGS = (*PICKLED, ".safetensors", ".index.json")
_WEIGHTS = tuple(f"*{ending}" for ending in _ENDINGS)


def fetch(text: str, local: bool = False) -> Path:
    """The file or folder that OWNER/REPO, or OWNER/REPO:FILE_OR_FOLDER, names, downloaded unless it is in the cache.

    Without a part after the colon it is the transformer of a pipeline, or what lies at the top of the repository.

    Args:
        text: the id.
        local: only look into the cache.

    Raises:
        CheckpointError: there is no such repository, no such part of it, or no access.
        Unreachable: it is not in the cache, and there is no way to the hub.
    """
    found = ID.fullmatch(text)
    assert found is not None, "the caller has matched it"
    repo, inside = found["repo"], found["inside"]
    try:
        if inside is not None and inside.endswith(_ENDINGS):
            return Path(hf_hub_download(repo, inside, local_files_only=local))
        if inside is None and _is_pipeline(repo, local):
            inside = "transformer"
        return _folder(repo, inside, local)
    except GatedRepoError as error:
        raise CheckpointError(
            f"{repo} asks for an agreement on its page; agree there, and log in with `hf auth login`."
        ) from error
    except RepositoryNotFoundError as error:
        raise CheckpointError(f"the hub has no repository {repo}, or not for you; see its page, or log in.") from error
    except (LocalEntryNotFoundError, OfflineModeIsEnabled, ConnectionError, TimeoutError) as error:
        raise Unreachable(f"{repo} is not in the cache of the hub, which is not reached") from error
    except EntryNotFoundError as error:
        raise CheckpointError(f"{repo} has no {inside}; see the list of files on its page.") from error
    except HFValidationError as error:
        raise CheckpointError(f"{repo!r} is no id of a repository: {str(error).splitlines()[0]}") from error
    except HfHubHTTPError as error:
        raise CheckpointError(f"the hub refuses {repo}: {str(error).splitlines()[0]}") from error


def _is_pipeline(repo: str, local: bool) -> bool:
    try:
        hf_hub_download(repo, "model_index.json", local_files_only=local)
    except LocalEntryNotFoundError:
        if local or _cached(repo):
            return False
        raise
    except EntryNotFoundError:
        return False
    return True


def _cached(repo: str) -> bool:
    """Whether anything of a repository is in the cache, when the hub is not reached."""
    try:
        snapshot_download(repo, local_files_only=True, allow_patterns=[])
    except LocalEntryNotFoundError:
        return False
    return True


def _folder(repo: str, inside: str | None, local: bool) -> Path:
    if inside is None:
        patterns, without = ["*.json", *_WEIGHTS], ["*/*"]
    else:
        patterns, without = [f"{inside.strip('/')}/*"], []
    root = Path(snapshot_download(repo, allow_patterns=patterns, ignore_patterns=without, local_files_only=local))
    folder = root if inside is None else root / inside.strip("/")
    if not folder.is_dir() or not any(path.name.endswith(_ENDINGS) for path in folder.iterdir()):
        place = "its top folder" if inside is None else inside
        if local or constants.HF_HUB_OFFLINE:
            raise Unreachable(f"the cache of the hub has no weights of {repo} in {place}")
        raise CheckpointError(f"{repo} has no weights in {place}; write {repo}:FILE or {repo}:FOLDER.")
    return folder


def checked(file: Path) -> str:
    """The sha256 of a file in the cache of the hub, which keeps large files under that name.

    Raises:
        CheckpointError: it is another file.
    """
    found, stored = digest(file), file.resolve().name
    if re.fullmatch(r"[0-9a-f]{64}", stored) and stored != found:
        raise CheckpointError(
            f"{file} has the sha256 {found}, and the hub says {stored}: it is damaged; remove it from the cache of the "
            "hub, and it will be downloaded again."
        )
    return found
