"""Download files from the Hugging Face hub. huggingface_hub does the caching, the progress bar and the resuming."""

from __future__ import annotations

import re
from pathlib import Path, PurePosixPath

from huggingface_hub import hf_hub_download, snapshot_download, try_to_load_from_cache
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
from tokdyn.bases.table import HUB_ID, INDEX
from tokdyn.checkpoints.formats import PICKLED
from tokdyn.errors import CheckpointError
from tokdyn.hub import reachable

_ENDINGS = (*PICKLED, ".safetensors", ".index.json")
_WEIGHTS = tuple(f"*{ending}" for ending in _ENDINGS)


def pipeline_index(repo: str, file: str = INDEX) -> tuple[Path | None, str]:
    """Return the model_index.json of a pipeline, from the cache or else from the hub; or None and why there is none.

    Args:
        repo: OWNER/REPO.
        file: another small file to return, such as transformer/config.json.
    """
    unreachable = "it cannot be reached"
    try:
        cached = try_to_load_from_cache(repo, file)
        if isinstance(cached, str):
            return Path(cached), ""
        if not reachable():
            return None, unreachable
        return Path(hf_hub_download(repo, file)), ""
    except GatedRepoError:
        return None, "access to it has to be granted (accept its licence there, then run hf auth login)"
    except RepositoryNotFoundError:
        return None, "there is no such repository, or it is private"
    except (LocalEntryNotFoundError, HfHubHTTPError, HFValidationError, OSError) as error:
        missing = isinstance(error, EntryNotFoundError) and not isinstance(error, LocalEntryNotFoundError)
        return None, f"it holds no {file}" if missing else unreachable


def fetch_from_hub(name: str, local: bool = False) -> Path:
    """Download the file or folder of a hub id, unless it is in the cache.

    Args:
        name: OWNER/REPO:FILE_OR_FOLDER; or OWNER/REPO, which stands for the transformer if the repository is a
            pipeline, and otherwise for the top folder of the repository.
        local: look only into the cache.

    Returns:
        The path in the cache.

    Raises:
        CheckpointError: the repository or the file does not exist, the path leaves the repository, or access is denied.
        Unreachable: the file is not in the cache, and the hub cannot be reached.
    """
    match = HUB_ID.fullmatch(name)
    assert match is not None, "the caller has checked the id"
    repo, inside, local = match["repo"], match["inside"], local or not reachable()
    if inside is not None and ".." in PurePosixPath(inside).parts:
        raise CheckpointError(
            f"{name} names {inside!r}, which is outside of the repository {repo}; give a path without '..'."
        )
    try:
        if inside is not None and inside.endswith(_ENDINGS):
            return Path(hf_hub_download(repo, inside, local_files_only=local))
        if inside is None and _is_pipeline(repo, local):
            inside = "transformer"
        return _folder(repo, inside, local)
    except GatedRepoError as error:
        raise CheckpointError(
            f"{repo} requires an agreement; accept it on the page of the repository, and log in with `hf auth login`."
        ) from error
    except RepositoryNotFoundError as error:
        raise CheckpointError(
            f"the hub has no repository {repo} that you can read; check its name, or log in with `hf auth login`."
        ) from error
    except (LocalEntryNotFoundError, OfflineModeIsEnabled, ConnectionError, TimeoutError) as error:
        raise Unreachable(f"{repo} is not in the cache of the hub, which cannot be reached") from error
    except EntryNotFoundError as error:
        raise CheckpointError(f"{repo} has no {inside}; see the list of files on its page.") from error
    except HFValidationError as error:
        raise CheckpointError(
            f"{repo!r} is not a valid id of a repository, expected OWNER/REPO: {str(error).splitlines()[0]}"
        ) from error
    except HfHubHTTPError as error:
        raise CheckpointError(f"the hub refuses access to {repo}: {str(error).splitlines()[0]}") from error


def _is_pipeline(repo: str, local: bool) -> bool:
    """Return whether a repository holds a diffusers pipeline."""
    try:
        hf_hub_download(repo, INDEX, local_files_only=local)
    except LocalEntryNotFoundError:
        if local or _cached(repo):
            return False
        raise
    except EntryNotFoundError:
        return False
    return True


def _cached(repo: str) -> bool:
    """Return whether any file of a repository is in the cache."""
    try:
        snapshot_download(repo, local_files_only=True, allow_patterns=[])
    except LocalEntryNotFoundError:
        return False
    return True


def _folder(repo: str, inside: str | None, local: bool) -> Path:
    """Download a folder with weights and return its path; the top folder of the repository if `inside` is None."""
    if inside is None:
        patterns, ignored = ["*.json", *_WEIGHTS], ["*/*"]
    else:
        patterns, ignored = [f"{inside.strip('/')}/*"], []
    root = Path(snapshot_download(repo, allow_patterns=patterns, ignore_patterns=ignored, local_files_only=local))
    folder = root if inside is None else root / inside.strip("/")
    if not folder.is_dir() or not any(path.name.endswith(_ENDINGS) for path in folder.iterdir()):
        place = "its top folder" if inside is None else inside
        if local:
            raise Unreachable(f"the cache of the hub has no weights of {repo} in {place}")
        raise CheckpointError(f"{repo} has no weights in {place}; give {repo}:FILE or {repo}:FOLDER.")
    return folder


def checked_digest(file: Path) -> str:
    """Return the sha256 of a file in the hub's cache, after comparing it with the one in the name of the cached file.

    Raises:
        CheckpointError: the file is damaged.
    """
    actual, stored = digest(file), file.resolve().name
    if re.fullmatch(r"[0-9a-f]{64}", stored) and stored != actual:
        raise CheckpointError(
            f"{file} is damaged: its sha256 is {actual}, but the hub says {stored}; remove it from the cache of the "
            "hub, and it will be downloaded again."
        )
    return actual
