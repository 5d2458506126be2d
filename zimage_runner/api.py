"""The runner from Python: a warm model that draws into memory (``load``), and whole runs (``run``).

    import zimage_runner as zr

    with zr.load(model="zimage_nano") as z:
        for drawn in z.generate(["a cat"], seeds=[1, 2]):
            drawn.image.show()                      # a PIL image; drawn.record says how it was drawn
    done = zr.run("experiment=quickstart", seeds="0-3")

Both take the words of the command line, and groups and fields without a dot as keywords. They may be called from any
thread and any number of times in a process: runs take turns, and so do the calls of one loaded model.
"""

from __future__ import annotations

import contextlib
import json
import sys
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from zimage_runner.errors import EXIT_BAD_INPUT, RunStopped, UserError
from zimage_runner.logs import refusals

if TYPE_CHECKING:
    from PIL.Image import Image

    from zimage_runner.config.schema import Composed, RunConfig
    from zimage_runner.outputs.config import Output

OF_A_RUN = ("prompt", "prompts", "seeds", "dry_run", "resume", "retry", "verify", "skip_existing", "name", "report",
            "output_file", "executor", "continue", "hydra")  # fmt: skip
"""Fields and groups that ``load`` has no use for."""
OF_A_TERMINAL = ("--help", "--version", "--shell-completion", "--hydra-help")
"""Options that print what a terminal asks for, and draw nothing; also shortened, and as -h and -sc."""
_composing = threading.RLock()
"""Hydra composes one config at a time, and ``sys.argv`` and the runner's shared executor are the process's own."""


@dataclass(frozen=True, slots=True)
class Drawn:
    """One picture."""

    image: Image
    """RGB, as drawn: nothing was encoded yet."""
    record: dict[str, Any]
    """Prompt, seed, params, model, numerics, versions: what the file of a run carries too."""
    _output: Output = field(repr=False)

    def save(self, path: str | Path) -> None:
        """Write it with its record in it, as a run does: ``reproduce`` draws it again. The suffix says the format.

        Raises UserError for a suffix of another format, OSError.
        """
        import numpy as np

        from zimage_runner.outputs import atomic
        from zimage_runner.outputs.config import Format
        from zimage_runner.outputs.encoders import encode

        suffix = Path(path).suffix.lower().replace(".jpeg", ".jpg")
        format = next((format for format in Format if format.suffix == suffix), None)
        if format is None:
            raise UserError(f"{path}: name a .png, .jpg or .webp file")
        output = self._output if self._output.format is format else replace(self._output, format=format, quality=None)
        atomic.replace_file(Path(path), encode(np.asarray(self.image), self.record, output))


class Loaded:
    """A model that stays loaded between calls. Made by ``load``; a context manager, closed when its block ends."""

    def __init__(self, config: RunConfig) -> None:
        from zimage_runner.runner.pool import SharedExecutor
        from zimage_runner.signals import StopRequest

        self._config = config
        self._shared = SharedExecutor(StopRequest())  # never set: Ctrl-C is Python's own KeyboardInterrupt here
        self._lock = threading.Lock()
        self._closed = False

    def generate(
        self, prompts: str | Sequence[str], seeds: int | str | Sequence[int] | Mapping[str, Any] = 42, **sampling: Any
    ) -> list[Drawn]:
        """Draw every prompt with every seed: all of the first prompt's seeds, then the second's.

        seeds: a number, a list, ``"0-9,42"`` or a mapping, as on the command line. sampling: fields of the sampling
        group, such as ``height=512``, for this call alone. The first call loads the model; sizes that are new are
        warmed up. Raises UserError for what cannot be drawn as asked, RunStopped if drawing fails.
        """
        from zimage_runner.prompts.inline import Inline
        from zimage_runner.runner.spec import plan_run

        texts, given = _listed(prompts), _listed(seeds)
        texts = texts if isinstance(texts, list) else [texts]
        for text in texts:
            if not isinstance(text, str):
                raise UserError(f"prompts: {text!r} is a {type(text).__name__}: a prompt is a text, such as 'a cat'")
        config = replace(
            self._config,
            prompt=None,
            prompts=Inline(texts=texts),
            seeds=dict(given) if isinstance(given, Mapping) else given,
            sampling=_changed(self._config.sampling, sampling),
        )
        with self._lock:
            if self._closed:
                raise UserError("this model was closed: load it again")
            spec = plan_run(config, self._shared.memo)
            return self._draw(spec)

    def _draw(self, spec: Any) -> list[Drawn]:
        from PIL import Image

        from zimage_runner.executors.base import Batch

        found: dict[str, Drawn] = {}
        batches = (Batch(items=items) for items in spec.plan.batches(spec.config.engine.largest_batch))
        with self._shared.lease(spec) as lease:
            report = lease.report()
            for result in lease.run(batches):
                if result.images is None:
                    raise RunStopped(f"{result.items[0].item_dir} was not drawn: {result.error}")
                for item, pixels in zip(result.items, result.images.wait(), strict=True):
                    image = Image.fromarray(pixels.copy())
                    found[item.item_dir] = Drawn(image, spec.recipe(item, report), spec.config.output)
        items = sorted(spec.plan.items, key=lambda item: item.prompt_index)  # within a prompt as planned
        return [found[item.item_dir] for item in items]

    def close(self) -> None:
        """Free the model. Harmless when called twice."""
        with self._lock:
            self._closed = True
            self._shared.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def load(*words: str, **options: Any) -> Loaded:
    """Get a model ready to be drawn with: ``load(model="zimage_nano")``, ``load("+experiment=turbo", "memory.x=y")``.

    Of an experiment, prompts and seeds are left to ``generate``. Options are checked now; the weights are found and
    loaded by the first ``generate``. Raises UserError.
    """
    return Loaded(_compose([*words, *_as_words(options)]))


@dataclass(frozen=True, slots=True)
class Item:
    """One picture of a run, as its ledger has it."""

    directory: Path
    image: Path | None
    """None for an item that failed."""

    @property
    def ok(self) -> bool:
        """Whether its picture is there."""
        return self.image is not None

    def record(self) -> dict[str, Any]:
        """Its record.json. Raises OSError, ValueError."""
        return json.loads((self.directory / "record.json").read_text(encoding="utf-8"))


@dataclass(frozen=True, slots=True)
class Run:
    """What a run has left."""

    exit_code: int
    """0 all items done, 1 some failed, 2 refused, 130 interrupted: ``run("resume=DIRECTORY")`` goes on."""
    directory: Path | None
    """None where nothing was made (dry_run). Of a multirun, the directory of its jobs."""
    jobs: tuple[Run, ...] = ()
    """The runs of a multirun; their exit code is the multirun's."""

    @property
    def summary(self) -> dict[str, Any]:
        """Its summary.json; empty where there is none."""
        try:
            return json.loads(((self.directory or Path()) / "summary.json").read_text(encoding="utf-8"))
        except FileNotFoundError:
            return {}

    @property
    def items(self) -> list[Item]:
        """Every item that is drawn or failed, of all jobs. Raises UserError for a ledger that cannot be read."""
        if self.jobs:
            return [item for job in self.jobs for item in job.items]
        if self.directory is None:
            return []
        from zimage_runner.outputs.ledger import RECORDS, Ledger

        entries = Ledger.load(self.directory / RECORDS).entries
        folders = {name: self.directory / name for name in entries}
        return [Item(folders[n], folders[n] / e.image if e.ok else None) for n, e in sorted(entries.items())]


def run(*words: str, **options: Any) -> Run:
    """Do what the command line with these words does, and wait for it: ``run("experiment=quickstart", seeds="0-3")``.

    Progress and summary go to stderr and stdout as ever. In the main thread, Ctrl-C finishes the pictures in flight;
    in another thread nothing listens to signals. Raises UserError if the run was refused.
    """
    from zimage_runner.cli.main import main
    from zimage_runner.runner.execute import execute

    if (encoding := sys.getfilesystemencoding()) != "utf-8":  # the command line starts Python anew; here it is not ours
        raise UserError(f"this Python takes names of files as {encoding}: start it with PYTHONUTF8=1")
    for word in words:
        name = str(word).partition("=")[0]
        if name in ("-h", "-sc") or (len(name) > 2 and any(option.startswith(name) for option in OF_A_TERMINAL)):
            raise UserError(f"{word} is for a terminal, and draws nothing: type zimage-runner {word}")
    directories: list[Path] = []

    def take(composed: Composed) -> int | Future[int]:
        directories.append(composed.directory)
        return execute(composed)

    refused: list[str] = []
    with _composing, _restored():
        token = refusals.set(refused)
        try:
            code = main([*words, *_as_words(options)], take)
        finally:
            refusals.reset(token)
    made = [directory for directory in directories if directory.is_dir()]
    if code == EXIT_BAD_INPUT and not made:
        raise UserError(refused[-1] if refused else "the run was refused")
    if len(directories) > 1:
        return Run(code, made[0].parent if made else None, tuple(Run(code, directory) for directory in made))
    return Run(code, made[0] if made else None)


def _compose(words: Sequence[str]) -> RunConfig:
    """The config that the words mean, checked. Raises UserError."""
    from hydra import compose, initialize_config_dir

    from zimage_runner.cli.messages import CONFIG_ERRORS, explain, typed
    from zimage_runner.cli.quoting import quote_free_text
    from zimage_runner.cli.resume.saved import override_key
    from zimage_runner.cli.sweep.launcher import register_launcher
    from zimage_runner.cli.words import readable
    from zimage_runner.config.paths import CONFIG_DIR
    from zimage_runner.config.registry import register
    from zimage_runner.config.schema import RunConfig
    from zimage_runner.runner.spec import check

    for word in words:
        if word.startswith("-") or (override_key(word) or "").partition(".")[0] in OF_A_RUN:
            raise UserError(f"{word} is of a whole run, and has no effect on a loaded model: leave it out, or use run")
    with _composing, _restored():
        register()
        register_launcher()
        try:
            with initialize_config_dir(version_base="1.3", config_dir=str(CONFIG_DIR)):
                config = typed(compose("config", overrides=quote_free_text(readable(words))))
        except CONFIG_ERRORS as error:
            raise UserError(explain(error)) from None
    assert isinstance(config, RunConfig)
    check(config)
    return config


def _listed(value: Any) -> Any:
    """Several values as a list; one value, a text or a mapping, which Python would take apart, as it is."""
    return list(value) if isinstance(value, Iterable) and not isinstance(value, str | Mapping) else value


def _changed(sampling: Any, changes: Mapping[str, Any]) -> Any:
    """Sampling fields with some of them changed. Raises UserError for one that is none, or of another type."""
    from zimage_runner.prompts.picture_values import as_chosen, picture_value
    from zimage_runner.sampling import PICTURE_FIELDS, SAMPLING_FIELDS, Sampling

    pictures = {name: changes[name] for name in PICTURE_FIELDS if changes.get(name) is not None}
    pictures = {
        name: picture_value(name, str(value) if isinstance(value, Path) else value, "sampling")
        for name, value in pictures.items()
    }
    pictures = {name: as_chosen(name, value) for name, value in pictures.items()}
    changes = {name: value for name, value in changes.items() if name not in PICTURE_FIELDS}
    kinds = dict.fromkeys(SAMPLING_FIELDS, (int,)) | {
        "guidance_scale": (int, float), "cfg_normalization": (int, float), "cfg_truncation": (int, float),
        "negative_prompt": (str,),
    }  # fmt: skip
    for name, value in changes.items():
        if name not in kinds:
            fields = ", ".join([*SAMPLING_FIELDS, *PICTURE_FIELDS])
            raise UserError(f"{name}={value!r}: no such field of sampling; there are {fields}")
        if value is not None and (not isinstance(value, kinds[name]) or isinstance(value, bool)):
            raise UserError(f"{name}={value!r}: give {' or '.join(kind.__name__ for kind in kinds[name])}")
    assert isinstance(sampling, Sampling)
    return replace(sampling, **changes, **pictures)


def _as_words(options: Mapping[str, Any], group: str = "") -> list[str]:
    """Keywords as words of the command line: texts as typed, a group's mapping field by field, all else as values."""
    from zimage_runner.config.paths import CONFIG_DIR

    words = []
    for name, value in options.items():
        if isinstance(value, Mapping) and not group and (CONFIG_DIR / name).is_dir():
            words += _as_words(value, f"{name}.")
        else:
            words.append(f"{group}{name}={value if isinstance(value, str | Path) else _literal(value)}")
    return words


def _literal(value: Any) -> str:
    """A value in Hydra's notation. Raises UserError for what no config can hold."""
    from zimage_runner.cli.quoting import hydra_quote

    if isinstance(value, str | Path):
        return hydra_quote(str(value))
    if isinstance(value, Mapping):
        return "{" + ",".join(f"{name}:{_literal(inner)}" for name, inner in value.items()) + "}"
    if isinstance(value, list | tuple | range):
        return "[" + ",".join(map(_literal, value)) + "]"
    if value is None or isinstance(value, bool | int | float):
        return json.dumps(value)
    raise UserError(
        f"{value!r} is a {type(value).__name__}: give text, numbers, true or false, None, lists or mappings"
    )


@contextlib.contextmanager
def _restored() -> Iterator[None]:
    """Leave the command line, and the Hydra of a program that uses it as well, as they were."""
    from hydra.core.global_hydra import GlobalHydra
    from hydra.core.hydra_config import HydraConfig

    argv, hydra, config = sys.argv, GlobalHydra.instance().hydra, HydraConfig.instance().cfg
    GlobalHydra.instance().clear()
    try:
        yield
    finally:
        sys.argv = argv
        GlobalHydra.instance().hydra, HydraConfig.instance().cfg = hydra, config
