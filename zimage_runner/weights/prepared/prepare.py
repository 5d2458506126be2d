"""Making a prepared checkpoint: bf16, one file a component, in use order, fused, without what inference never reads.

Streams: no more than a few pieces of 32 MB are in memory at a time, whatever the checkpoint's size. The files are
packed (weights/packed/) where a CUDA GPU will read them.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import shutil
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

from zimage_runner.errors import UserError, one_line
from zimage_runner.model import Model, Prepare
from zimage_runner.outputs.parsed import from_json
from zimage_runner.weights.cache import OTHERS_MAY_WRITE, cache_root, make_folders, trusted_folder, write_json
from zimage_runner.weights.find.checkpoint import Checkpoint
from zimage_runner.weights.find.layout import Layout, inspect
from zimage_runner.weights.find.verify import remember, sha256_of
from zimage_runner.weights.io import Threads, write_exactly
from zimage_runner.weights.packed.writer import write_packed
from zimage_runner.weights.prepared import prepared
from zimage_runner.weights.prepared.manifest import describe, is_bfloat16
from zimage_runner.weights.prepared.names import COMPONENTS
from zimage_runner.weights.prepared.pieces import Piece, PlannedTensor, pieces, plan_component, read_piece
from zimage_runner.weights.prepared.prepared import BF16, Prepared, UnusablePrepared
from zimage_runner.weights.safetensors_file import create

log = logging.getLogger(__name__)

THREADS = 4
SPARE_BYTES = 512 * 1024 * 1024
"""Room left on the disk beyond the prepared files."""
AUTO_BYTES = 1_000_000_000
"""``model.prepare=auto`` leaves smaller checkpoints as they are: they load in no time."""

TELL_SECONDS, POLL_SECONDS = 30.0, 0.1
"""How often who waits for another process's copy says so, and looks."""
ROOM_TO_TRY_AGAIN = 1_000_000_000
"""Bytes that must have become free before a copy that failed is tried again."""
TRANSFORMER = "transformer"
REMEDY = "free some space, set ZIMAGE_RUNNER_CACHE to a larger disk, or set model.prepare=never"


@dataclass(frozen=True, slots=True)
class Kind:
    """Which copy."""

    precision: str
    packed: bool

    def __str__(self) -> str:
        return (f", {self.precision}" if self.precision != BF16 else "") + (", packed" if self.packed else "")


def ensure_prepared(checkpoint: Checkpoint, model: Model, dtype: str, precision: str = BF16) -> Prepared | None:
    """The prepared form of ``checkpoint`` for an engine computing in ``dtype``, made now if ``model.prepare`` allows.

    None when the published files should be loaded: ``model.prepare=never``; a checkpoint that is small (auto); float32
    computation of weights that preparing would round; no writable disk with room (warned about).
    """
    if model.prepare is Prepare.never:
        return None
    found = prepared.find(checkpoint, model, precision=precision)
    if found is None:
        layout = inspect(checkpoint.path)
        if model.prepare is Prepare.auto and layout.weight_bytes < AUTO_BYTES:
            return None
        if dtype != "bfloat16" and not is_bfloat16(layout):
            return None
        if _has_failed_before(checkpoint, model):
            return None
        try:
            found = build(checkpoint, model, precision=precision)
        except (UserError, OSError) as error:
            log.warning("loading the published files, which is slower: %s", error)
            _remember_failure(checkpoint, model)
            return None
    return found if dtype == "bfloat16" or found.is_lossless else None


def _failure_file(checkpoint: Checkpoint) -> Path:
    return cache_root() / "prepared" / f".{checkpoint.digest[:16]}.failed.json"


def _remember_failure(checkpoint: Checkpoint, model: Model) -> None:
    """A copy that found no room would find none at the next start either, and trying takes as long as loading."""
    with contextlib.suppress(OSError, UserError):
        write_json(_failure_file(checkpoint), {"free_bytes": _most_free(model)})


def _has_failed_before(checkpoint: Checkpoint, model: Model) -> bool:
    """Whether making the copy failed, and the disks have no more room now than they had then."""
    try:
        known = from_json(_failure_file(checkpoint).read_bytes())["free_bytes"]
        return _most_free(model) < known + ROOM_TO_TRY_AGAIN
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _most_free(model: Model) -> int:
    return max((prepared.free_bytes(root) for root in prepared.roots(model) if root.is_dir()), default=0)


def build(checkpoint: Checkpoint, model: Model, packed: bool | None = None, precision: str = BF16) -> Prepared:
    """Find or make the prepared form. Raises UserError when no place has room or the checkpoint cannot be prepared.

    ``packed``: that form alone; None makes the one that suits this machine, and takes any that is there. A copy in
    eight bits is always packed.

    Appears under its name only when complete; a second process making the same one waits and takes the first's.
    """
    found = prepared.find(checkpoint, model, packed, precision)
    if found is not None:
        return found
    if packed is None or precision != BF16:
        packed = precision != BF16 or prepared.reads_packed()
    layout = inspect(checkpoint.path)
    plan = {component: plan_component(layout, component, precision) for component in COMPONENTS}
    root = _root_with_room(model, sum(tensor.nbytes for tensors in plan.values() for tensor in tensors))
    target = root / prepared.folder_name(model, checkpoint.digest, packed, precision)
    with _lock(root / f".{target.name}.lock"):
        try:
            found = prepared.open_prepared(target, checkpoint.digest, precision)
            prepared.check_digests(found, model, checkpoint)
            return found
        except UnusablePrepared:
            try:
                like = _same_networks(checkpoint, model) if precision != BF16 else {}
                _make(checkpoint, layout, plan, target, Kind(precision, packed), like)
            except OSError as error:  # a disk that another process has filled meanwhile, a file that cannot be read
                raise UserError(f"cannot prepare {model.name} in {target}: {error}: {REMEDY}") from error
        _remove_superseded(checkpoint, target)
    return prepared.open_prepared(target, checkpoint.digest)


def _same_networks(checkpoint: Checkpoint, model: Model) -> dict[str, Path]:
    """Files of the packed copy in bf16 that a copy in eight bits would hold as well, where that copy is."""
    found = prepared.find(checkpoint, model, packed=True)
    return {} if found is None else {name: file.path for name, file in found.weights.items() if name != TRANSFORMER}


def _make(
    checkpoint: Checkpoint,
    layout: Layout,
    plan: dict[str, list[PlannedTensor]],
    target: Path,
    kind: Kind,
    like: Mapping[str, Path],
) -> None:
    """Make the copy. ``like``: files of another copy that are the same, of some components."""
    began = time.perf_counter()
    total = sum(tensor.nbytes for tensors in plan.values() for tensor in tensors)
    log.info("preparing %s (%.1f GB, once%s) in %s", layout.path, total / 1e9, kind, target)
    # The lock is held, so a temporary folder of this name is what a killed process left.
    temporary = target.with_name(f".{target.name}.tmp")
    for leftover in (temporary, target):
        if leftover.exists():
            shutil.rmtree(leftover)
    temporary.mkdir(parents=True)
    try:
        with Threads(len(COMPONENTS)) as hashing:  # of one component while the next is made
            sha256 = {}
            for component, tensors in plan.items():
                path = prepared.component_file(temporary, component)
                if component not in like or not _linked(like[component], path):
                    _write_component(path, component, tensors, kind.packed)
                sha256[component] = hashing.submit(sha256_of, path, lambda count: hashing.check())
        digests = {component: future.result() for component, future in sha256.items()}
        names = _copy_configs(layout, temporary)
        manifest = describe(checkpoint, layout, plan, temporary, digests, names, kind.packed, kind.precision)
        write_json(temporary / prepared.MANIFEST, manifest)
        close_to_others(temporary)
        os.rename(temporary, target)
        _sync_folder(target.parent)
        for component, digest in digests.items():
            remember(prepared.component_file(target, component), digest)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    log.info("prepared in %.1f s", time.perf_counter() - began)


def _linked(source: Path, path: Path) -> bool:
    """Give a file a second name, where both are on one disk that can; whether that was done."""
    path.parent.mkdir(exist_ok=True)
    try:
        os.link(source, path)
    except OSError:
        return False
    return True


def _write_component(path: Path, component: str, plan: list[PlannedTensor], packed: bool = False) -> None:
    from tqdm import tqdm

    path.parent.mkdir(exist_ok=True)
    bar = tqdm(
        total=sum(tensor.nbytes for tensor in plan),
        unit="B",
        unit_scale=True,
        desc=f"prepare {component}",
        disable=None,
    )
    with bar:
        if packed:
            write_packed(path, plan, THREADS, bar.update)
        else:
            _write_plain(path, plan, bar.update)


def _write_plain(path: Path, plan: list[PlannedTensor], advance: Callable[[int], object]) -> None:
    places = create(path, {tensor.name: (tensor.dtype, tensor.shape) for tensor in plan}, {"format": "pt"})

    def convert(piece: Piece) -> int:
        data = read_piece(piece).numpy().data
        write_exactly(handle, piece.offset, data)
        return len(data)

    handle = os.open(path, os.O_WRONLY)
    try:
        with Threads(THREADS) as pool:
            for written in pool.map(convert, pieces(plan, places)):
                advance(written)
        os.fsync(handle)
    finally:
        os.close(handle)


def _copy_configs(layout: Layout, target: Path) -> list[str]:
    names = []
    for path in layout.config_files:
        name = path.relative_to(layout.path)
        if name.as_posix() == "model_index.json":
            continue  # only a published checkpoint has it: no other software may take this one for that
        (target / name).parent.mkdir(exist_ok=True)
        shutil.copyfile(path, target / name)
        names.append(name.as_posix())
    return names


def _root_with_room(model: Model, nbytes: int) -> Path:
    """The first place that can be written and has room. Raises UserError saying what each lacks."""
    reasons = []
    for root in prepared.roots(model):
        try:
            make_folders(root)
        except OSError as error:
            reasons.append(f"{root} cannot be made ({error.strerror})")
            continue
        free = prepared.free_bytes(root)
        if not os.access(root, os.W_OK):
            reasons.append(f"{root} cannot be written")
        elif not trusted_folder(root):
            reasons.append(f"{root} can be written by others, who could change what is drawn from it")
        elif free < nbytes + SPARE_BYTES:
            reasons.append(f"{root} has {free / 1e9:.1f} GB free of the {(nbytes + SPARE_BYTES) / 1e9:.1f} GB needed")
        else:
            return root
    raise UserError(f"cannot prepare {model.name}: {'; '.join(reasons)}: {REMEDY}")


def close_to_others(folder: Path) -> None:
    """Take the right to write from all but the user, whatever the umask is; readable as the umask says."""
    for path in [folder, *folder.rglob("*")]:
        path.chmod(path.stat().st_mode & ~OTHERS_MAY_WRITE)


@contextlib.contextmanager
def _lock(path: Path) -> Iterator[None]:
    """Held by one process at a time; the kernel lets go of it when the process dies. Waiting is told, and for whom."""
    with path.open("a+", encoding="utf-8") as file:
        waited, tell_at = 0.0, 0.0
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if waited >= tell_at:
                    log.warning("%s: %s; waiting for it", path.with_suffix("").name.strip("."), _holder(file))
                    tell_at = waited + TELL_SECONDS
                time.sleep(POLL_SECONDS)
                waited += POLL_SECONDS
        file.truncate(0)
        file.write(f"{os.getpid()} on {socket.gethostname()}")
        file.flush()
        yield


def _holder(file: TextIO) -> str:
    """Who prepares the copy meanwhile, as the lock file says, and whether that process is stopped (Ctrl-Z)."""
    file.seek(0)
    text = one_line(file.read(100))
    pid, _, host = text.partition(" on ")
    if not pid.isdigit() or host != socket.gethostname():
        return f"process {text} prepares it" if text else "another process prepares it"
    with contextlib.suppress(OSError, IndexError):
        state = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(") ")[2][0]
        if state in "Tt":
            return f"process {pid}, which prepares it, is stopped: kill -CONT {pid} lets it go on"
    return f"process {pid} prepares it"


def _remove_superseded(checkpoint: Checkpoint, target: Path) -> None:
    """Delete our own prepared copies of the same source folder whose weights are no longer what it holds."""
    for other in target.parent.iterdir():
        if other == target or other.name.startswith(".") or not (other / prepared.MANIFEST).is_file():
            continue
        try:
            source = prepared.read_manifest(other)["source"]
        except UnusablePrepared:
            continue
        if source["path"] == str(checkpoint.path) and source["digest"] != checkpoint.digest:
            log.info("removing %s: its source has changed", other)
            # Whoever makes the plain and whoever makes the packed copy hold two locks: both may be at it.
            shutil.rmtree(other, ignore_errors=True)
            if other.exists():
                log.warning("%s could not be removed", other)


def _sync_folder(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
