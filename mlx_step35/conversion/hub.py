"""Fetching a source from the hub and publishing a result; huggingface_hub resumes both.

It is imported where it is used, because that takes longer than starting the rest of the package.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

from mlx_step35.checkpoint import NANO, resolve_model
from mlx_step35.checkpoint.headers import INDEX, read_header, read_index
from mlx_step35.conversion.card import CARD
from mlx_step35.conversion.journal import LOCK
from mlx_step35.conversion.outputs import COPIED
from mlx_step35.errors import RequestError, Step35Error

# The card is read for its licence; no output gets it.
SMALL = ("config.json", INDEX, CARD, *COPIED)
SIDECARS = "mtp*.safetensors"

_NO_TOKEN = "no hub token; run 'hf auth login' or set HF_TOKEN"


class HubError(Step35Error):
    """The hub cannot be reached or refuses; nothing local has changed."""


@dataclass(frozen=True, slots=True)
class Announced:
    """What a checkpoint holds as far as that is known without its weights, and what its files say of
    themselves."""

    names: frozenset[str]
    metadata: Mapping[str, str]
    mtp_metadata: Mapping[str, str]


def fetch_small(source: str, revision: str | None) -> Path:
    """A local directory for a path or repo id; of a repo only config, index, tokenizer and the like.

    Raises RequestError for what is neither and for a directory's revision, HubError when the hub does not
    give it.
    """
    if _is_local(source):
        if revision is not None:
            raise RequestError(f"'{source}' is a directory, which has no --revision", field="revision")
        return resolve_model(source)
    path = Path(source).expanduser()
    if path.exists() or source.startswith((".", "/", "~")) or source.count("/") != 1:
        raise RequestError(f"'{source}' is neither a directory nor a hub repo id", field="hf_path")
    from huggingface_hub import snapshot_download

    with _one_line(source):
        return Path(snapshot_download(source, revision=revision, allow_patterns=list(SMALL)))


def announced(source: str, small: Path) -> Announced | None:
    """What the index lists, or without one the header of a hub repo's weights, and the sidecars' headers.

    None for a directory without an index, whose headers are at hand anyway.
    """
    index = read_index(small)
    if _is_local(source):
        files = sorted(file for file in small.glob(SIDECARS) if file.name not in index.values())
        headers = [read_header(file) for file in files]
        names = {*index, *(name for header in headers for name in header.entries)}
        own = {key: text for header in headers for key, text in header.metadata.items()}
        return Announced(frozenset(names), {}, own) if index else None
    return _announced_by_hub(source, small.name, index)


def fetch_shards(source: str, small: Path, shards: list[str]) -> Path:
    """The directory with these shards added, and sidecars if there are any; a local one has what it has."""
    if _is_local(source):
        return small
    from huggingface_hub import snapshot_download

    with _one_line(source):
        # The commit of the first step, so that a push in between mixes nothing.
        patterns = [*SMALL, *(shards or ["model*.safetensors"]), SIDECARS]
        return Path(snapshot_download(source, revision=small.name, allow_patterns=patterns))


def check_upload(repo: str) -> None:
    """Refuse an upload that cannot begin, before hours are spent on what it would publish.

    Raises RequestError for what is no repo id, HubError without a token.
    """
    from huggingface_hub import get_token

    # Documented at this place, though the library's own marks do not export it.
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

    with _one_line(repo):
        validate_repo_id(repo)
    if repo.count("/") != 1:
        raise RequestError(f"'{repo}' is no repo id: it lacks its owner", field="upload_repo")
    if get_token() is None:
        raise HubError(_NO_TOKEN)


def upload(directory: Path, repo: str) -> str:
    """Create the repo if needed and upload a finished directory; returns its address.

    An upload that was cut short continues. Raises HubError with one line when there is no token,
    no network or no permission, and when the repo holds something else.
    """
    from huggingface_hub import HfApi

    check_upload(repo)
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


def _announced_by_hub(repo: str, revision: str, index: Mapping[str, str]) -> Announced:
    from huggingface_hub import HfApi

    names = set(index)
    # MLX writes null where there is none.
    metadata: dict[str, str] = {}
    mtp_metadata: dict[str, str] = {}
    with _one_line(repo):
        api = HfApi()
        if not index:
            weights = api.get_safetensors_metadata(repo, revision=revision)
            names.update(weights.weight_map)
            for header in weights.files_metadata.values():
                metadata.update(header.metadata or {})
        for name in api.list_repo_files(repo, revision=revision):
            if fnmatch(name, SIDECARS) and name not in index.values():
                sidecar = api.parse_safetensors_file_metadata(repo, name, revision=revision)
                names.update(sidecar.tensors)
                mtp_metadata.update(sidecar.metadata or {})
    return Announced(frozenset(names), metadata, mtp_metadata)


def _is_local(source: str) -> bool:
    return source == NANO or Path(source).expanduser().is_dir()


@contextmanager
def _one_line(repo: str) -> Iterator[None]:
    """The hub's many errors as one line each."""
    from httpx2 import HTTPError
    from huggingface_hub.errors import (
        EntryNotFoundError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        LocalTokenNotFoundError,
        NotASafetensorsRepoError,
        RepositoryNotFoundError,
        SafetensorsParsingError,
    )

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
    except SafetensorsParsingError as error:
        raise HubError(f"{repo} holds a damaged file: {_first_line(error)}") from None
    except HFValidationError as error:
        raise RequestError(f"'{repo}' is no repo id: {_first_line(error)}", field="upload_repo") from None
    except HfHubHTTPError as error:
        raise HubError(f"the hub refused {repo}: {_first_line(error)}") from None
    # Without a network huggingface_hub passes on what its HTTP client raises, which is no OSError.
    except (HTTPError, ConnectionError) as error:
        raise HubError(f"the hub cannot be reached for {repo}: {_first_line(error)}") from None


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
