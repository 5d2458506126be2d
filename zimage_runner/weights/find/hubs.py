"""The two hubs a checkpoint can come from, each through its own client, imported only when it is used.

Nothing is deleted from a hub's cache by this project: it may be a read-only mount, and it is 33 GB to get again.
"""

from __future__ import annotations

import os
from collections.abc import Collection
from pathlib import Path

from zimage_runner.errors import UserError, one_line
from zimage_runner.logs import others_for_programs
from zimage_runner.model import Model, Source
from zimage_runner.weights.find.hugging_face import check_answers, keep_partial_files
from zimage_runner.weights.find.layout import WEIGHT_STEMS, hub_patterns

HUB_NAMES = {Source.modelscope: "ModelScope", Source.huggingface: "Hugging Face"}
DEFAULT_CACHES = {
    Source.modelscope: ("MODELSCOPE_CACHE", ".cache/modelscope"),
    Source.huggingface: ("HF_HOME", ".cache/huggingface"),
}
"""The variable that names a hub's cache, and where it is without it, from the home directory."""


TIME_LIMITS = {
    "MODELSCOPE_API_TIMEOUT": "20",
    "MODELSCOPE_API_MAX_RETRIES": "2",
    "MODELSCOPE_REPO_TREE_PAGE_MAX_ATTEMPTS": "2",
    "MODELSCOPE_DOWNLOAD_TIMEOUT": "20",
    "MODELSCOPE_DOWNLOAD_MAX_RETRIES": "3",
    "HF_HUB_ETAG_TIMEOUT": "15",
    "HF_HUB_DOWNLOAD_TIMEOUT": "15",
}
"""Seconds and numbers of tries after which a hub that says nothing is given up; what the user has set wins."""
PROXIES = ("ALL_PROXY", "all_proxy", "HTTPS_PROXY", "https_proxy", "HTTP_PROXY", "http_proxy")


class NotCached(UserError):
    """model.offline=true and the hub's cache does not hold this repository and revision, or not all of it."""

    def __init__(self, message: str, found: str = "") -> None:
        super().__init__(message)
        self.found = found
        """What is in the cache, without model.offline, which the user may not have set."""


def export_cache_dir(cache_dir: str | None) -> None:
    """Set MODELSCOPE_CACHE and HF_HOME, for this process and its children; the clients read them when imported."""
    if cache_dir is None:
        return
    path = str(Path(cache_dir).expanduser().absolute())
    os.environ["MODELSCOPE_CACHE"] = path
    os.environ["HF_HOME"] = path


def cache_dir_of(model: Model) -> Path:
    """Where this model's hub keeps its files."""
    if model.cache_dir is not None:
        return Path(model.cache_dir).expanduser().absolute()
    variable, default = DEFAULT_CACHES[model.source]
    return Path(os.environ.get(variable) or Path.home() / default).expanduser().absolute()


def snapshot(model: Model, *, local_files_only: bool, components: Collection[str] = tuple(WEIGHT_STEMS)) -> Path:
    """The repository's directory, from the cache alone or downloaded as needed: weights of ``components`` alone.

    Raises UserError when the cache has nothing (local_files_only) or the hub cannot deliver.
    """
    export_cache_dir(model.cache_dir)
    for variable, seconds in TIME_LIMITS.items():
        os.environ.setdefault(variable, seconds)
    fetch = _from_modelscope if model.source is Source.modelscope else _from_huggingface
    try:
        return Path(fetch(model, local_files_only, hub_patterns(components))).absolute()
    except (UserError, MemoryError):
        raise
    except Exception as error:  # their transport libraries raise whatever they like: httpx2, requests, urllib3, ssl
        raise _failed(model, error, local_files_only) from error


def _from_modelscope(model: Model, local_files_only: bool, patterns: list[str]) -> str:
    from modelscope import snapshot_download

    with others_for_programs("modelscope", "modelscope_hub"):
        return snapshot_download(
            model.repo,
            # Without a revision the client would take any single cached one for the default branch.
            revision=model.revision or (None if model.offline else "master"),
            # The client's own default differs from MODELSCOPE_CACHE in older versions, so it is always explicit.
            cache_dir=str(cache_dir_of(model)),
            local_files_only=local_files_only,
            allow_patterns=patterns,
        )


def _from_huggingface(model: Model, local_files_only: bool, patterns: list[str]) -> str:
    if model.offline:
        os.environ["HF_HUB_OFFLINE"] = "1"
    from huggingface_hub import get_token, snapshot_download
    from huggingface_hub.errors import IncompleteSnapshotError

    if not local_files_only:
        if not (get_token() or "").isascii():
            raise UserError("HF_TOKEN, or the token of `hf auth login`, holds letters that no token has: set it again")
        check_answers(str(model.repo))
        keep_partial_files()
    assert model.repo is not None  # Model's own check
    try:
        with others_for_programs("huggingface_hub"):
            return snapshot_download(
                model.repo,
                revision=model.revision,
                cache_dir=cache_dir_of(model) / "hub",
                local_files_only=local_files_only,
                allow_patterns=patterns,
            )
    except IncompleteSnapshotError as error:
        if local_files_only:
            return error.snapshot_path  # the caller looks for itself what is missing there
        raise


def _failed(model: Model, error: Exception, local_files_only: bool) -> UserError:
    what = f"{model.repo}{f' at revision {model.revision}' if model.revision else ''}"
    if local_files_only:
        return NotCached(
            f"model.offline=true and {what} is not in {HUB_NAMES[model.source]}'s cache {cache_dir_of(model)}: "
            "run once with model.offline=false, or set model.cache_dir or model.path to where it is",
            f"{what} is not downloaded",
        )
    proxy = next((name for name in PROXIES if os.environ.get(name, "").startswith("socks")), None)
    if isinstance(error, ImportError) and proxy is not None:
        remedy = f"{proxy}={os.environ[proxy]} needs the package socksio: pip install socksio, or unset {proxy}"
    else:
        remedy = "the next start goes on from there"
    return UserError(f"cannot download {what} from {HUB_NAMES[model.source]}: {_reason(error)}: {remedy}")


def _reason(error: BaseException) -> str:
    """The client's own words in one line, and which files failed where it says so."""
    text = one_line(" ".join(str(error).split()))
    failed = getattr(error, "failed_files", None)
    if failed:
        text += "; " + "; ".join(f"{name}: {' '.join(str(cause).split())}" for name, cause in list(failed.items())[:3])
    return text[:600] or type(error).__name__
