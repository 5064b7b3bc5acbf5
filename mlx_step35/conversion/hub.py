"""Fetching a source from the hub and publishing a result; huggingface_hub resumes both."""

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
from huggingface_hub import HfApi, get_token, snapshot_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    LocalTokenNotFoundError,
    NotASafetensorsRepoError,
    RepositoryNotFoundError,
)

from mlx_step35.checkpoint import NANO, resolve_model
from mlx_step35.checkpoint.headers import INDEX, read_index
from mlx_step35.conversion.journal import LOCK
from mlx_step35.conversion.outputs import COPIED
from mlx_step35.errors import RequestError, Step35Error

SMALL = ("config.json", INDEX, *COPIED)


_NO_TOKEN = "no hub token; run 'hf auth login' or set HF_TOKEN"


class HubError(Step35Error):
    """The hub cannot be reached or refuses; nothing local has changed."""


def fetch_small(source: str, revision: str | None) -> Path:
    """A local directory for a path or repo id; of a repo only config, index, tokenizer and the like.

    Raises RequestError for what is neither, HubError when the hub does not give it.
    """
    if _is_local(source):
        return resolve_model(source)
    path = Path(source).expanduser()
    if path.exists() or source.startswith((".", "/", "~")) or source.count("/") != 1:
        raise RequestError(f"'{source}' is neither a directory nor a hub repo id", field="hf_path")
    with _one_line(source):
        return Path(snapshot_download(source, revision=revision, allow_patterns=list(SMALL)))


def tensor_names(source: str, small: Path) -> Collection[str]:
    """What a checkpoint holds, from its index; of a hub repo without one, from the header of its weights.

    Empty for a directory without an index, whose headers are at hand anyway.
    """
    index = read_index(small)
    if index or _is_local(source):
        return index.keys()
    with _one_line(source):
        return HfApi().get_safetensors_metadata(source, revision=small.name).weight_map.keys()


def fetch_shards(source: str, small: Path, shards: list[str]) -> Path:
    """The directory with these shards added, and sidecars if there are any; a local one has what it has."""
    if _is_local(source):
        return small
    with _one_line(source):
        # The commit of the first step, so that a push in between mixes nothing.
        patterns = [*SMALL, *(shards or ["model*.safetensors"]), "mtp*.safetensors"]
        return Path(snapshot_download(source, revision=small.name, allow_patterns=patterns))


def upload(directory: Path, repo: str) -> str:
    """Create the repo if needed and upload a finished directory; returns its address.

    An upload that was cut short continues. Raises HubError with one line when there is no token,
    no network or no permission, and when the repo holds something else.
    """
    if get_token() is None:
        raise HubError(_NO_TOKEN)
    with _one_line(repo):
        api = HfApi()
        if api.repo_exists(repo):
            own = {str(file.relative_to(directory)) for file in directory.rglob("*")} | {".gitattributes"}
            foreign = sorted(set(api.list_repo_files(repo)) - own)
            if foreign:
                raise HubError(f"{repo} exists and holds '{foreign[0]}', which is not of this upload")
        address = api.create_repo(repo, exist_ok=True)
        api.upload_folder(
            repo_id=repo,
            folder_path=directory,
            ignore_patterns=[LOCK, ".*.partial"],
            commit_message="Upload converted weights",
        )
    return str(address)


def _is_local(source: str) -> bool:
    return source == NANO or Path(source).expanduser().is_dir()


@contextmanager
def _one_line(repo: str) -> Iterator[None]:
    """The hub's many errors as one line each."""
    try:
        yield
    except LocalTokenNotFoundError:
        raise HubError(_NO_TOKEN) from None
    except (RepositoryNotFoundError, EntryNotFoundError) as error:
        if isinstance(error, LocalEntryNotFoundError):
            raise HubError(f"the hub cannot be reached for {repo}") from None
        raise HubError(f"the hub has no {repo}, or this token may not see it") from None
    except NotASafetensorsRepoError:
        raise HubError(f"{repo} holds neither model.safetensors nor {INDEX}") from None
    except HFValidationError as error:
        raise RequestError(f"'{repo}' is no repo id: {error}", field="upload_repo") from None
    except HfHubHTTPError as error:
        raise HubError(f"the hub refused {repo}: {_first_line(error)}") from None
    except (httpx.HTTPError, ConnectionError) as error:
        raise HubError(f"the hub cannot be reached for {repo}: {_first_line(error)}") from None


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
