"""Prepared checkpoints on disk: where they are, what their manifest says, whether they are whole. No torch here.

Layout, beside nothing that was downloaded:
``<root>/<model name>-<source digest>/`` with ``manifest.json``, ``tokenizer/``, ``scheduler/scheduler_config.json``
and, for each of text_encoder, transformer and vae, ``config.json`` and one safetensors file under its published name.
A packed one (weights/packed/) is another folder, ``...-packed``. New copies are packed where a CUDA GPU reads them; of
two copies either will do, and an older plain one goes on being used. One whose transformer is in eight bits, and which
is packed as far as that gains, is a third folder, ``...-fp8`` or ``...-int8``.
"""

from __future__ import annotations

import functools
import logging
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from zimage_runner.model import Model, Verify
from zimage_runner.outputs.parsed import from_json
from zimage_runner.weights.cache import OTHERS_MAY_WRITE, ROOT_USER, cache_root, is_writable, trusted_folder
from zimage_runner.weights.find.checkpoint import Checkpoint
from zimage_runner.weights.find.digest import sampled_digests
from zimage_runner.weights.find.layout import WEIGHT_STEMS
from zimage_runner.weights.find.verify import file_digests
from zimage_runner.weights.packed.format import Packing, packing_of
from zimage_runner.weights.preload.cuda_driver import torch_is_cpu_only
from zimage_runner.weights.prepared.names import COMPONENTS
from zimage_runner.weights.safetensors_file import BadWeightsFile, WeightsFile, read_header

log = logging.getLogger(__name__)

FORMAT = "zimage-runner-prepared"
VERSION = 3
"""Raised whenever the rules in names.py change what a prepared file holds."""
READ = (2, VERSION)
"""Versions that can be used. Copies of version 2 hold the text encoder's table of tokens too, which nothing reads."""
MANIFEST = "manifest.json"
BF16 = "bf16"
"""The precision of copies that hold the weights as they are, rounded to bfloat16."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Prepared:
    """A prepared checkpoint that was found whole."""

    path: Path
    manifest: dict[str, Any]
    weights: dict[str, WeightsFile]
    """One file a component."""
    packings: dict[str, Packing] = field(default_factory=dict)
    """How each component's file is unpacked; empty for plain files."""

    @property
    def is_lossless(self) -> bool:
        """Every tensor was bfloat16 already: nothing was rounded."""
        return bool(self.manifest["lossless"])


def component_file(path: Path, component: str) -> Path:
    return path / component / f"{WEIGHT_STEMS[component]}.safetensors"


def roots(model: Model) -> list[Path]:
    """Where prepared checkpoints of this model may be: beside its downloads, or in the runner's cache."""
    own = cache_root() / "prepared"
    if model.cache_dir is None:
        return [own]
    return [Path(model.cache_dir).expanduser().absolute() / "zimage_runner" / "prepared", own]


def folder_name(model: Model, digest: str, packed: bool, precision: str = BF16) -> str:
    """Name of the folder that holds this copy of the weights with this digest."""
    return re.sub(r"[^\w.-]+", "_", model.name) + _suffix(digest, packed, precision)


def _suffix(digest: str, packed: bool, precision: str) -> str:
    kind = ("-packed" if packed else "") if precision == BF16 else f"-{precision}"
    return f"-{digest[:16]}{kind}"


def reads_packed() -> bool:
    """Whether a copy made here is to be packed: a GPU unpacks it on the fly, which a CPU does not."""
    return not torch_is_cpu_only()


def candidates(checkpoint: Checkpoint, model: Model, packed: bool | None = None, precision: str = BF16) -> list[Path]:
    """Folders named as this checkpoint's copies in this precision are, sound or not; ``packed`` as for ``find``."""
    forms = [reads_packed(), not reads_packed()] if packed is None else [packed]
    suffixes = dict.fromkeys(_suffix(checkpoint.digest, form, precision) for form in forms)
    return [path for suffix in suffixes for root in roots(model) for path in sorted(root.glob(f"[!.]*{suffix}"))]


def find(checkpoint: Checkpoint, model: Model, packed: bool | None = None, precision: str = BF16) -> Prepared | None:
    """The prepared copy of exactly this checkpoint in this precision, if there is one, and whole.

    ``packed``: the packed or the plain one alone; None takes either, first the form that this machine reads sooner.
    """
    for path in candidates(checkpoint, model, packed, precision):
        if not _is_trusted(path):
            _tell_once(path)
            continue
        try:
            found = open_prepared(path, checkpoint.digest, precision)
            check_digests(found, model, checkpoint)
            return found
        except UnusablePrepared as error:
            log.warning("not using the prepared checkpoint %s: %s", path, error)
    return None


def _is_trusted(path: Path) -> bool:
    """Whether nobody else can have made or changed the copy."""
    if not trusted_folder(path):
        return False
    for part in path.rglob("*"):
        status = part.lstat()
        if status.st_mode & OTHERS_MAY_WRITE or status.st_uid not in (os.geteuid(), ROOT_USER):
            return False
    return True


@functools.cache
def _tell_once(path: Path) -> None:
    log.warning(
        "not using the prepared checkpoint %s: other users can write to it or to a folder above it: chmod -R go-w, or "
        "set ZIMAGE_RUNNER_CACHE to a folder of your own",
        path,
    )


def _check_configs(found: Prepared, checkpoint: Checkpoint) -> None:
    """Compare the copy's configs and tokenizer with their originals, byte by byte. Raises UnusablePrepared."""
    for name in found.manifest["config_files"]:
        try:
            differs = (found.path / name).read_bytes() != (checkpoint.path / name).read_bytes()
        except OSError as error:
            raise UnusablePrepared(str(error)) from error
        if differs:
            raise UnusablePrepared(f"{name} was altered")


class UnusablePrepared(Exception):
    """A prepared checkpoint that is damaged, of another source or of another version."""


def open_prepared(path: Path, source_digest: str | None = None, precision: str | None = None) -> Prepared:
    """Read the manifest and check sizes, headers and sampled digests of the files against it.

    Raises UnusablePrepared naming the file and what is wrong.
    """
    manifest = read_manifest(path)
    if not is_read(manifest):
        raise UnusablePrepared(f"{MANIFEST} is of version {manifest.get('version')}, not {VERSION}")
    if source_digest is not None and manifest["source"]["digest"] != source_digest:
        raise UnusablePrepared("it was made from other weights")
    if precision is not None and manifest.get("precision", BF16) != precision:
        raise UnusablePrepared(f"it is in {manifest.get('precision')}, not in {precision}")
    try:
        weights = {component: read_header(component_file(path, component)) for component in COMPONENTS}
        packings = {component: found for component, file in weights.items() if (found := packing_of(file)) is not None}
    except (OSError, BadWeightsFile) as error:
        raise UnusablePrepared(str(error)) from error
    sampled = sampled_digests(list(weights.values()))
    for (component, file), digest in zip(weights.items(), sampled, strict=True):
        if digest != manifest["components"].get(component, {}).get("sampled_sha256"):
            raise UnusablePrepared(f"{file.path.relative_to(path)} was altered")
    missing = [name for name in manifest["config_files"] if not (path / name).is_file()]
    if missing:
        raise UnusablePrepared(f"{missing[0]} is missing")
    if set(packings) != (set(weights) if manifest.get("packed") else set()):
        raise UnusablePrepared(f"{MANIFEST} and its files do not agree on whether they are packed")
    return Prepared(path=path, manifest=manifest, weights=weights, packings=packings)


def check_digests(found: Prepared, model: Model, checkpoint: Checkpoint) -> None:
    """Compare the files' sha256 with the manifest's and with those of their making, as ``model.verify`` says.

    Configs and tokenizer are always compared with the checkpoint's own. Raises UnusablePrepared naming the file.

    Making them remembers their digests, so that ``first_use`` reads nothing here as long as they stay untouched.
    """
    _check_configs(found, checkpoint)
    if model.verify is Verify.headers or (model.verify is Verify.first_use and not is_writable()):
        return
    paths = {component: file.path for component, file in found.weights.items()}
    digests = file_digests(list(paths.values()), force=model.verify is Verify.always)
    for component, digest in zip(paths, digests, strict=True):
        if digest.sha256 != found.manifest["components"].get(component, {}).get("sha256"):
            raise UnusablePrepared(f"{digest.path.relative_to(found.path)} was altered")
        if digest.is_altered:  # and the manifest with it
            raise UnusablePrepared(f"{digest.path.relative_to(found.path)} was altered since {digest.expected_from}")


def is_read(manifest: Mapping[str, Any]) -> bool:
    """Whether a manifest is of a copy that this version can use."""
    return manifest.get("format") == FORMAT and manifest.get("version") in READ


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a prepared folder. Raises UnusablePrepared."""
    try:
        manifest = from_json((folder / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UnusablePrepared(f"{MANIFEST} cannot be read: {error}") from error
    if not _is_manifest(manifest):
        raise UnusablePrepared(f"{MANIFEST} is not a manifest")
    return manifest


def _is_manifest(value: Any) -> bool:
    """Whether a value has a manifest's fields in their types; none of its names leads out of the folder."""
    if not isinstance(value, dict) or not {"source", "components", "config_files", "lossless"} <= value.keys():
        return False
    components, names = value["components"], value["config_files"]
    return (
        isinstance(value["source"], dict)
        and "digest" in value["source"]
        and isinstance(components, dict)
        and all(isinstance(component, dict) for component in components.values())
        and isinstance(names, list)
        and all(isinstance(name, str) and name.isprintable() for name in names)
        and all(".." not in PurePosixPath(name).parts for name in names)
        and not any(PurePosixPath(name).is_absolute() for name in names)
    )


def free_bytes(path: Path) -> int:
    """Free space for this user on the disk that will hold ``path``."""
    while not path.exists():
        path = path.parent
    stat = os.statvfs(path)
    return stat.f_bavail * stat.f_frsize
