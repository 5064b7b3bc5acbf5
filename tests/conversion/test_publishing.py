"""Sources from the hub, uploads to it, and the model card."""

from pathlib import Path
from typing import Any

import pytest

from mlx_step35.checkpoint import load_checkpoint
from mlx_step35.conversion.hub import HubError
from mlx_step35.convert import convert, main
from mlx_step35.errors import RequestError


class FakeHub:
    """What the upload calls of huggingface_hub's API."""

    def __init__(self, files: list[str] | None) -> None:
        self.files = files
        self.uploaded: dict[str, Any] = {}

    def repo_exists(self, repo: str) -> bool:
        return self.files is not None

    def list_repo_files(self, repo: str) -> list[str]:
        return self.files or []

    def create_repo(self, repo: str, exist_ok: bool) -> str:
        return f"https://huggingface.co/{repo}"

    def upload_folder(self, **options: Any) -> None:
        self.uploaded = options


def test_upload_creates_and_sends_the_directory(
    release_source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub = FakeHub(None)
    monkeypatch.setattr("huggingface_hub.HfApi", lambda: hub)
    monkeypatch.setattr("huggingface_hub.get_token", lambda: "token")
    convert(str(release_source), tmp_path / "out", True, upload_repo="me/model")
    assert hub.uploaded["repo_id"] == "me/model"
    assert hub.uploaded["folder_path"] == tmp_path / "out"
    # Cut short, it may continue in its own repo, but not in another's.
    hub.files = ["model.safetensors", ".gitattributes"]
    convert(str(release_source), tmp_path / "out", True, upload_repo="me/model")
    hub.files = ["pytorch_model.bin"]
    with pytest.raises(HubError, match=r"me/model exists and holds 'pytorch_model\.bin'"):
        convert(str(release_source), tmp_path / "out", True, upload_repo="me/model")


def test_an_upload_that_cannot_begin_is_refused_before_anything_is_written(
    release_source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    with pytest.raises(HubError, match="no hub token"):
        convert(str(release_source), tmp_path / "out", True, upload_repo="me/model")
    for repo in ("", "model", "me/my model", "a/b/c", "me/model.git"):
        with pytest.raises(RequestError, match="is no repo id"):
            convert(str(release_source), tmp_path / "out", True, upload_repo=repo)
    assert not (tmp_path / "out").exists()


def test_a_token_that_is_lost_meanwhile_is_one_line(
    release_source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokens = iter(["token", None])
    monkeypatch.setattr("huggingface_hub.get_token", lambda: next(tokens))
    with pytest.raises(HubError, match="no hub token"):
        convert(str(release_source), tmp_path / "out", True, upload_repo="me/model")
    load_checkpoint(tmp_path / "out")


def test_a_hub_source_is_fetched_in_two_steps(
    release_source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[list[str]] = []

    def snapshot(repo: str, revision: str | None, allow_patterns: list[str]) -> str:
        asked.append(allow_patterns)
        return str(release_source)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "config.json").write_bytes((release_source / "config.json").read_bytes())
    convert("stepfun-ai/Step-3.5-Flash", tmp_path / "out", mtp="only")
    first, second = asked
    assert "config.json" in first and not any("safetensors" in item and "index" not in item for item in first)
    assert "model-00001.safetensors" in second
    assert "model-00002.safetensors" not in second


def test_the_card_holds_the_facts(
    release_source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *a, **k: str(release_source))
    monkeypatch.chdir(tmp_path)
    main(["--hf-path", "stepfun-ai/Step-3.5-Flash", "--revision", "abc", "--mlx-path", "out", "-q"])
    card = (tmp_path / "out" / "README.md").read_text()
    for line in (
        "base_model: stepfun-ai/Step-3.5-Flash",
        "base_model_relation: quantized",
        "license: apache-2.0",
        "- mlx",
        "at revision `abc`",
        "mlx_step35.convert --hf-path stepfun-ai/Step-3.5-Flash --revision abc --mlx-path out -q",
        "| experts |",
        "Not measured.",
    ):
        assert line in card
