"""From the ``model`` config group to a checked checkpoint on disk."""

from __future__ import annotations

import functools
import logging
from collections.abc import Collection
from pathlib import Path

from zimage_runner.errors import PROGRAM, UserError, called
from zimage_runner.logs import say
from zimage_runner.model import Model, Source, Verify
from zimage_runner.outputs.parsed import from_json
from zimage_runner.weights.cache import cache_root, is_writable, read_entry, write_entry
from zimage_runner.weights.find import hubs
from zimage_runner.weights.find.checkpoint import Checkpoint
from zimage_runner.weights.find.controlnet import ControlNetFile, controlnet_files, find_controlnet
from zimage_runner.weights.find.digest import weights_digest
from zimage_runner.weights.find.layout import WEIGHT_STEMS, IncompleteCheckpoint, Layout, inspect
from zimage_runner.weights.find.verify import FileDigest, file_digests

log = logging.getLogger(__name__)

_INCOMPLETE_HUB = "the hub's own copy is incomplete, or model.revision predates these files"

CHECKSUMS = "SHA256SUMS"
"""The embedded model's own list, as ``sha256sum`` writes it."""
ALL = tuple(WEIGHT_STEMS)
EMBEDDED = Path(__file__).resolve().parent.parent.parent / "assets" / "zimage_nano"


def resolve(model: Model) -> Checkpoint:
    """Find, download if needed, and check the checkpoint that ``model`` names.

    A complete snapshot in the hub's cache is used as it is, without asking the hub whether a newer one exists: pin
    ``model.revision`` or run ``python -m zimage_runner prepare download`` to follow the hub. Sizes and headers of the
    weights are always checked, their sha256 as ``model.verify`` says. Raises UserError; imports no torch.
    """
    controlnet_files(model)  # before gigabytes are fetched for one that is not there
    layout = locate(model)
    check_digests(model, layout)
    digest = weights_digest(layout)
    if layout.composition:
        _tell(layout.composition)
    revision = _revision(model, layout.path) or digest[:12]
    return Checkpoint(path=layout.path, revision=revision, digest=digest, controlnet=_controlnet(model, layout.path))


def _controlnet(model: Model, checkpoint: Path) -> ControlNetFile | None:
    """The model's ControlNet, which must fit the checkpoint's transformer."""
    if model.controlnet is None:
        return None
    return find_controlnet(model, from_json((checkpoint / "transformer" / "config.json").read_bytes()))


@functools.cache  # jobs of a sweep say it once
def _tell(text: str) -> None:
    say(f"zimage_runner: {text}")


def resolve_without_network(model: Model) -> Checkpoint | None:
    """As ``resolve``, but None for a hub's model that no earlier run has downloaded."""
    base, wanted = model, ALL
    if model.is_assembled:
        from zimage_runner.weights.find.parts import base_of, given_parts, missing_parts

        parts = given_parts(model)
        base, wanted = base_of(model), tuple(name for name in ALL if name not in parts)
        if not missing_parts(model, parts):
            return resolve(model)
    if base.path is None and base.source in hubs.HUB_NAMES and _cached(base, wanted) is None:
        return None
    return resolve(model)


def needs_hub(model: Model) -> bool:
    """Whether ``resolve`` will ask a hub: no earlier run has found there what this model needs of it."""
    parts_missing = True
    base = model
    if model.is_assembled:
        from zimage_runner.weights.find.parts import base_of, given_parts, missing_parts

        base, parts_missing = base_of(model), bool(missing_parts(model, given_parts(model)))
    hub = base.path is None and base.source in hubs.HUB_NAMES
    return hub and parts_missing and read_entry("snapshots", _snapshot_key(base)) is None


def locate(model: Model) -> Layout:
    """The checkpoint's directory and files, sizes and headers checked; downloads what is missing unless offline."""
    if not model.is_assembled:
        return published(model)
    from zimage_runner.weights.find.parts import assemble  # only files need the readers of all layouts

    return assemble(model, published)


def published(model: Model, components: Collection[str] = ALL) -> Layout:
    """The checkpoint that ``model.path`` or ``model.source`` names, or these components of it."""
    if model.path is not None or model.source is Source.local:
        path = Path(model.path or "").expanduser().absolute()
        return _repairable(path, f"model.path={path}", "copy or download the files again", components)
    if model.source is Source.embedded:
        return _repairable(EMBEDDED, "model.source=embedded", "reinstall zimage-runner", components)
    return _cached(model, components) or _in_hub_cache(model, components) or download(model, components)


def download(model: Model, components: Collection[str] = ALL) -> Layout:
    """Bring the hub's snapshot up to date: files that changed on the hub, or fail its checksum, are fetched again.

    ``components``: whose weights are wanted; the small files always are.
    """
    if model.path is not None or model.source not in hubs.HUB_NAMES:
        raise UserError(f"model.source={model.source.value}: nothing to download, choose a model that a hub holds")
    if model.offline:
        raise UserError("model.offline=true: nothing can be downloaded; set model.offline=false")
    log.info("downloading %s from %s to %s", model.repo, hubs.HUB_NAMES[model.source], hubs.cache_dir_of(model))
    path = hubs.snapshot(model, local_files_only=False, components=components)
    layout = _repairable(path, f"{model.repo} from {hubs.HUB_NAMES[model.source]}", _INCOMPLETE_HUB, components)
    write_entry("snapshots", _snapshot_key(model), {"path": str(path)})
    return layout


def check_digests(model: Model, layout: Layout) -> None:
    """Compare sha256 with the hub's or the first use's, as ``model.verify`` says. Raises UserError naming the file."""
    if model.verify is Verify.headers:
        return
    if model.path is None and model.source is Source.embedded and not model.is_assembled:
        _check_embedded(model, layout)
        return
    if model.verify is Verify.first_use and not is_writable():
        log.warning(
            "%s cannot be written, so sha256 of the weights is not checked: set ZIMAGE_RUNNER_CACHE", cache_root()
        )
        return
    altered = [d for d in file_digests(checked_files(model, layout), model.verify is Verify.always) if d.is_altered]
    if altered:
        raise UserError(f"{_describe(altered)}: {_repair(model, layout)}")
    if layout.sources:
        from zimage_runner.weights.find.finite import check_finite

        check_finite(layout.sources.values(), model.verify is Verify.always)


def checked_files(model: Model, layout: Layout) -> list[Path]:
    """The files whose digests are compared: all that is read of a hub's snapshot; a folder's weights alone.

    A local folder's configs are its owner's to edit; ``model.verify=always`` looks at them too.
    """
    own = model.path is not None or model.source is Source.local or model.is_assembled
    small = [] if own and model.verify is not Verify.always else layout.config_files
    return [*layout.weight_paths, *small]


def _check_embedded(model: Model, layout: Layout) -> None:
    """Compare the embedded model's files with the list that comes with them. Raises UserError naming the file."""
    force = model.verify is Verify.always
    if not force and not is_writable():
        return
    lines = (layout.path / CHECKSUMS).read_text(encoding="utf-8").splitlines()
    expected = {name: sha256 for sha256, name in (line.split("  ", 1) for line in lines)}
    for digest in file_digests([*layout.weight_paths, *layout.config_files], force):
        if digest.sha256 != expected.get(digest.path.relative_to(layout.path).as_posix()):
            raise UserError(f"model.source=embedded: {digest.path} was altered: reinstall zimage-runner")


def _repairable(path: Path, field: str, remedy: str, components: Collection[str]) -> Layout:
    try:
        return inspect(path, components=components)
    except IncompleteCheckpoint as error:
        raise UserError(f"{field}: {_problems(error)}: {remedy}") from error


def _cached(model: Model, components: Collection[str] = ALL) -> Layout | None:
    """The snapshot that was complete last time, if it still is: without importing the hub's client."""
    entry = read_entry("snapshots", _snapshot_key(model))
    if entry is None or not isinstance(entry.get("path"), str):
        return None
    try:
        return inspect(Path(entry["path"]), components=components)
    except UserError as error:
        log.info("the snapshot of the last run is no longer usable: %s", error)
        return None


def _in_hub_cache(model: Model, components: Collection[str]) -> Layout | None:
    """A complete snapshot in the hub's cache. Offline, whatever is missing is an error."""
    try:
        path = hubs.snapshot(model, local_files_only=True, components=components)
        layout = inspect(path, components=components)
    except IncompleteCheckpoint as error:
        if model.offline:
            found = f"the cached {model.repo} in {error.path} is incomplete: {_problems(error)}"
            remedy = "run once with model.offline=false, which fetches only those files"
            raise hubs.NotCached(f"model.offline=true and {found}: {remedy}", found) from error
        log.info("%s; fetching what is missing", error)
        return None
    except hubs.NotCached:
        if model.offline:
            raise
        return None
    write_entry("snapshots", _snapshot_key(model), {"path": str(layout.path)})
    return layout


def _problems(error: IncompleteCheckpoint) -> str:
    return str(error).removeprefix(f"{error.path}: ")


def _snapshot_key(model: Model) -> str:
    return "\0".join((model.source.value, model.repo or "", model.revision or "", str(hubs.cache_dir_of(model))))


def _revision(model: Model, path: Path) -> str | None:
    """Hubs keep a snapshot in snapshots/<revision>; Hugging Face writes the commit there, ModelScope the name."""
    if model.is_assembled:
        return None
    if model.path is None and path.parent.name == "snapshots":
        return path.name
    return model.revision if model.path is None and model.source in hubs.HUB_NAMES else None


def _describe(altered: list[FileDigest]) -> str:
    first = altered[0]
    more = f" (and {len(altered) - 1} more files)" if len(altered) > 1 else ""
    return (
        f"{first.path} was altered: sha256 {first.sha256[:16]}... instead of {str(first.expected)[:16]}... "
        f"of {first.expected_from}{more}"
    )


def _repair(model: Model, layout: Layout) -> str:
    accept = f"or accept it as it is with `{called(PROGRAM)} prepare accept` and the same model options"
    if model.path is None and model.source in hubs.HUB_NAMES and not model.is_assembled:
        return f"repair it with `{called(PROGRAM)} prepare download` and the same model options, {accept}"
    return f"copy {'it' if model.is_assembled else layout.path.name} again, {accept}"
