"""Checkpoints from the command line: fetch, check, prepare.

    python -m zimage_runner prepare [build|verify|download|accept|info] model=zimage_turbo [model.field=value ...]

build     make the prepared checkpoint: bf16, one file a component, in use order (default);
          engine.precision=fp8 or int8: the transformer in eight bits, the rest in bf16; how near its pictures are to
          bf16's is kept with it once `compare` has found out
verify    full sha256 of the published files; proof that the prepared checkpoint, if there is one, equals them
download  bring the hub's snapshot up to date; damaged files are fetched again
accept    take the files as they are now for the undamaged ones (after changing them on purpose)
info      where things are; changes nothing; `info FILE` says what a checkpoint or adapter in one file is

Exit codes: 0 done, 1 verify found a difference, 2 bad options or nothing that could be done, 130 interrupted: the
same command goes on from there.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from hydra import compose, initialize_config_dir

from zimage_runner.cli.messages import CONFIG_ERRORS, explain, typed
from zimage_runner.cli.quoting import quote_free_text
from zimage_runner.cli.sweep.launcher import register_launcher
from zimage_runner.config.paths import CONFIG_DIR
from zimage_runner.config.registry import register
from zimage_runner.engines.base import EngineConfig
from zimage_runner.engines.precision import likeness_text
from zimage_runner.engines.request import Needs
from zimage_runner.errors import EXIT_ITEMS_FAILED, EXIT_OK, PROGRAM, UserError, called
from zimage_runner.logs import Log, command, refuse, say, use_format
from zimage_runner.model import Model
from zimage_runner.signals import PATIENCE, StopRequest, graceful_stop
from zimage_runner.weights.find.checkpoint import Checkpoint
from zimage_runner.weights.find.controlnet import controlnet_files, describe_controlnet
from zimage_runner.weights.find.digest import weights_digest
from zimage_runner.weights.find.hubs import NotCached
from zimage_runner.weights.find.layout import Layout
from zimage_runner.weights.find.resolve import download, locate, resolve
from zimage_runner.weights.find.verify import file_digests, forget
from zimage_runner.weights.prepared import figures, prepared
from zimage_runner.weights.prepared.prepared import Prepared

COMPARE = 'python -m zimage_runner compare "engine.precision=bf16" "engine.precision={precision}" -- OPTIONS OF A RUN'
EXIT_DIFFERENT = EXIT_ITEMS_FAILED


def main(argv: Sequence[str]) -> int:
    """Run one command line and return its exit code."""
    return command(argv, __doc__, _act, bare=True)


def _act(argv: Sequence[str]) -> int:
    os.environ["HYDRA_FULL_ERROR"] = "1"
    words = [arg for arg in argv if "=" not in arg]
    try:
        if words[:1] == ["info"] and len(words) == 2:
            return _describe_file(Path(words[1]).expanduser())
        if len(words) > 1 or not set(words) <= ACTIONS.keys():
            raise UserError(
                f"{' '.join(words)}: say one of {', '.join(ACTIONS)}, then options such as model=zimage_turbo"
            )
        with graceful_stop() as stop:
            return ACTIONS[words[0] if words else "build"](compose_wanted([arg for arg in argv if "=" in arg]), stop)
    except CONFIG_ERRORS as error:
        return refuse(explain(error))


def _describe_file(path: Path) -> int:
    """Say what a file of weights is, from its header alone. Raises UserError for one that is none."""
    from zimage_runner.weights.adapters.keys import split_key
    from zimage_runner.weights.adapters.reader import describe_adapter
    from zimage_runner.weights.formats.checkpoint_file import open_checkpoint_file
    from zimage_runner.weights.formats.controlnet import is_controlnet
    from zimage_runner.weights.formats.files import open_stored

    tensors = open_stored(path).tensors
    if is_controlnet(tensors):
        lines = describe_controlnet(path)
    elif any(map(split_key, tensors)):
        lines = describe_adapter(path)
    else:
        lines = open_checkpoint_file(path).description()
    say("\n".join(lines), sys.stdout)
    return EXIT_OK


@dataclass(frozen=True, slots=True)
class Wanted:
    """Which prepared checkpoint is meant."""

    model: Model
    precision: str


def compose_wanted(overrides: Sequence[str]) -> Wanted:
    """What the same overrides would have the main command use. Raises UserError."""
    register()
    register_launcher()  # conf/config.yaml names it
    with initialize_config_dir(version_base="1.3", config_dir=str(CONFIG_DIR)):
        config = compose("config", overrides=quote_free_text(overrides))
    model, engine, log = typed(config.model), typed(config.engine), typed(config.log)
    assert isinstance(log, Log)
    use_format(log.format)
    assert isinstance(model, Model)
    assert isinstance(engine, EngineConfig)
    engine.check(Needs(model=model, memory=typed(config.memory), compile=typed(config.compile)))
    return Wanted(model, engine.precision.value)


def _build(wanted: Wanted, stop: StopRequest) -> int:
    from zimage_runner.weights.prepared.prepare import build

    with stop.interruptible(PATIENCE):
        checkpoint = resolve(wanted.model)
    with stop.interruptible():  # without a deadline: it removes what it has half made
        found = build(checkpoint, wanted.model, precision=wanted.precision)
    sizes = ", ".join(f"{name} {file.size / 1e9:.2f} GB" for name, file in found.weights.items())
    say(f"prepared: {found.path} ({sizes})", sys.stdout)
    if wanted.precision != prepared.BF16:
        _tell_likeness(found, wanted)
    return EXIT_OK


def _tell_likeness(found: Prepared, wanted: Wanted) -> None:
    """Print how near a copy's pictures are to bf16's, or what finds that out."""
    kept = figures.of_copy(found.manifest)
    for one in kept:
        how = ", ".join(f"{name} {value}" for name, value in one.get("numerics", {}).items())
        say(f"likeness to bf16 ({how}): {likeness_text(one)}", sys.stdout)
    if not kept:
        say(f"how near its pictures are to bf16's: {called(COMPARE).format(precision=wanted.precision)}", sys.stdout)


def _verify(wanted: Wanted) -> int:
    from zimage_runner.weights.prepared.compare import compare

    model = wanted.model
    layout = _here(model)
    digests = file_digests(layout.weight_paths, force=True)
    for digest in digests:
        name = layout.name_of(digest.path)
        expected = digest.expected
        verdict = f"ALTERED since {digest.expected_from}, was {expected}" if digest.is_altered else "as expected"
        say(
            f"{name}: sha256 {digest.sha256} {verdict if expected else 'recorded: nothing known to compare with'}",
            sys.stdout,
        )
    checkpoint = _checkpoint(model)
    found = prepared.find(checkpoint, model, precision=wanted.precision)
    if found is None:
        unusable = prepared.candidates(checkpoint, model, precision=wanted.precision)
        for path in unusable:
            say(f"prepared: {path} CANNOT BE USED: prepare build makes it anew", sys.stdout)
        if not unusable:
            say("prepared: none of these weights", sys.stdout)
        return EXIT_DIFFERENT if unusable or any(digest.is_altered for digest in digests) else EXIT_OK
    comparison = compare(layout, found)
    for difference in comparison.differences:
        say(f"prepared: {difference}", sys.stdout)
    verdict = "DIFFERS from" if comparison.differences else "equals"
    rounded = "bfloat16" if wanted.precision == prepared.BF16 else f"bfloat16, its transformer to {wanted.precision},"
    say(
        f"prepared: {found.path} {verdict} the source rounded to {rounded} "
        f"({comparison.tensors} tensors, {comparison.nbytes / 1e9:.2f} GB compared bit by bit)",
        sys.stdout,
    )
    altered = comparison.differences or any(digest.is_altered for digest in digests)
    return EXIT_DIFFERENT if altered else EXIT_OK


def _download(wanted: Wanted) -> int:
    model = wanted.model
    layout = download(model)
    forget([*layout.weight_paths, *layout.config_files])  # the client has just compared them with the hub's own sha256
    say(f"downloaded: {layout.path} ({layout.weight_bytes / 1e9:.2f} GB of weights)", sys.stdout)
    return EXIT_OK


def _accept(wanted: Wanted) -> int:
    model = wanted.model
    layout = _here(model)
    files, others = [*layout.weight_paths, *layout.config_files], controlnet_files(model)
    forget([*files, *others])
    for digest in file_digests([*files, *others], force=True):
        name = digest.path if digest.path in others else layout.name_of(digest.path)
        say(f"{name}: sha256 {digest.sha256} accepted", sys.stdout)
    return EXIT_OK


def _info(wanted: Wanted) -> int:
    model = wanted.model
    checkpoint = _checkpoint(model)
    layout = _here(model)
    found = prepared.find(checkpoint, model, precision=wanted.precision)
    say(f"checkpoint: {layout.path} ({layout.weight_bytes / 1e9:.2f} GB of weights)", sys.stdout)
    say(f"digest: {checkpoint.digest}", sys.stdout)
    say(f"prepared: {found.path if found else 'none; would be in ' + str(prepared.roots(model)[0])}", sys.stdout)
    if found is not None and wanted.precision != prepared.BF16:
        _tell_likeness(found, wanted)
    return EXIT_OK


def _here(model: Model) -> Layout:
    """The model's files as they are here: looking at them fetches nothing. Raises UserError where some are missing."""
    try:
        return locate(replace(model, offline=True))
    except NotCached as error:
        if model.offline:
            raise
        raise UserError(f"{error.found}: a run, or `{called(PROGRAM)} prepare`, fetches it") from error


def _checkpoint(model: Model) -> Checkpoint:
    """As resolve gives it, but without refusing altered files: they are what is looked at."""
    layout = _here(model)
    digest = weights_digest(layout)
    return Checkpoint(path=layout.path, revision=digest[:12], digest=digest)


def _at_once(action: Callable[[Wanted], int]) -> Callable[[Wanted, StopRequest], int]:
    """An action that the first signal ends, whatever it is doing."""

    def run(wanted: Wanted, stop: StopRequest) -> int:
        with stop.interruptible(PATIENCE):
            return action(wanted)

    return run


ACTIONS: dict[str, Callable[[Wanted, StopRequest], int]] = {
    "build": _build,
    "verify": _at_once(_verify),
    "download": _at_once(_download),
    "accept": _at_once(_accept),
    "info": _at_once(_info),
}


if __name__ == "__main__":
    from zimage_runner.startup.process import begin

    begin()
    sys.exit(main(sys.argv[1:]))
