"""The typed shape of a whole run: what Hydra composes and one ``OmegaConf.to_object`` instantiates."""

from __future__ import annotations

import enum
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from zimage_runner.compile import Compile
from zimage_runner.engines.base import AUTO, EngineConfig
from zimage_runner.engines.embedding_cache import EmbeddingCacheConfig
from zimage_runner.engines.threads import MOST as MOST_THREADS
from zimage_runner.errors import NO_HOME, UserError, check_range
from zimage_runner.executors.base import ExecutorConfig
from zimage_runner.logs import Log
from zimage_runner.memory.policies import Memory
from zimage_runner.model import FREE_TEXT, HARMLESS, Model
from zimage_runner.outputs.beneath import unfit_target
from zimage_runner.outputs.config import Format, Output
from zimage_runner.outputs.run_dir import remove_if_empty
from zimage_runner.outputs.survey import Retry
from zimage_runner.prompts.base import PromptSource
from zimage_runner.sampling import Sampling
from zimage_runner.serve.config import Server
from zimage_runner.warmup import Warmup

MISSING: Any = "???"
"""As OmegaConf spells it, and checked by a test: a run needs nothing of OmegaConf, whose import it would wait for."""
PICTURES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".avif", ".jxl"}
"""Suffixes that say what is in a file: another format's would lie."""
PLUGIN_MODULE = "hydra_plugins.zimage_runner"
"""Hydra takes plugins only from below this package. A real one would be imported by every Hydra program of the
environment, so ours is made in memory."""


@dataclass(kw_only=True, slots=True)
class WarmLauncherConfig:
    """``hydra/launcher=warm``: all jobs in this process, sharing sessions."""

    _target_: str = f"{PLUGIN_MODULE}.WarmLauncher"
    keep_going: bool = True
    """A failed job does not stop the others; the exit code shows that it failed."""


@dataclass(kw_only=True, slots=True)
class LoraFile:
    """An entry of ``loras``."""

    path: str = ""
    """A .safetensors file, or its name in one of ``lora_dirs``."""
    weight: float = 1.0
    """How strongly it is applied; negative ones lead away from it."""


class Report(enum.Enum):
    """Which figures are printed when a run ends."""

    standard = "standard"
    """Phases, seconds per image, memory."""
    article = "article"
    """The same, then the article's own figures in its words."""


@dataclass(kw_only=True, slots=True)
class RunConfig:
    """One run. Groups are typed by their abstract class; ``conf/`` says which option fills each."""

    name: str = field(default="run", metadata=HARMLESS)
    """First folder below the output root; letters, digits, dot, dash and underscore."""
    prompt: str | None = field(default=None, metadata=FREE_TEXT)
    """Free text: one prompt instead of the prompts group."""
    output_file: str | None = field(default=None, metadata=HARMLESS | FREE_TEXT)
    """Also put the (single) picture here."""
    seeds: Any = 42  # not a list: YAML could not put a mapping in its place
    """List such as [1,2] or [0-9,42], range such as 0-9, or a mapping {count, base} or {count, derive: prompt}."""
    dry_run: bool = field(default=False, metadata=HARMLESS)
    """Print the plan and generate nothing."""
    report: Report = Report.standard
    """Figures printed at the end: standard, or article (the article's as well, in its words)."""
    resume: str | None = field(default=None, metadata=HARMLESS | FREE_TEXT)
    """Finish this run directory, or ``latest``, with its own settings."""
    retry: Retry = field(default=Retry.unfinished, metadata=HARMLESS)
    """With resume: draw unfinished items (missing and failed), or failed ones alone."""
    verify: bool = field(default=False, metadata=HARMLESS)
    """With resume: read every finished picture and draw again those whose bytes changed."""
    skip_existing: str | None = field(default=None, metadata=HARMLESS | FREE_TEXT)
    """Directory or glob of earlier runs: their identical pictures are linked instead of drawn."""

    loras: list[LoraFile] = field(default_factory=list)
    """Adapters merged into the weights: [{path: style.safetensors, weight: 0.8}], or loras=[style.safetensors:0.8]."""
    lora_dirs: list[str] = field(default_factory=list, metadata=HARMLESS)
    """Folders in which adapters are looked for by name: those of loras, of <lora:name:0.8> in prompts, of tables."""
    embedding_cache: EmbeddingCacheConfig = field(default_factory=EmbeddingCacheConfig, metadata=HARMLESS)
    """Caption features kept on disk between runs."""

    log: Log = field(default_factory=Log, metadata=HARMLESS)
    """log.format: text, or json: the lines of run.log and of stderr as JSON objects."""

    model: Model = MISSING
    engine: EngineConfig = MISSING
    memory: Memory = field(default=MISSING, metadata=HARMLESS)
    warmup: Warmup = field(default=MISSING, metadata=HARMLESS)
    compile: Compile = MISSING
    sampling: Sampling = MISSING
    prompts: PromptSource = MISSING
    output: Output = field(default=MISSING, metadata=HARMLESS)
    executor: ExecutorConfig = field(default=MISSING, metadata=HARMLESS)

    def __post_init__(self) -> None:
        folder_name(self.name)
        check_home(self)
        check_loras(self)
        if self.prompt is not None and not self.prompt.strip():
            raise UserError("prompt='' is empty: write prompt='what the picture should show'")
        if self.skip_existing is not None and not self.skip_existing.strip():
            raise UserError("skip_existing='' is empty: name a run or the folder of runs")
        if self.output_file is not None:
            self.output_file = picture_file(self.output_file, self.output.format)
        self.output.root = os.path.expanduser(self.output.root)
        check_batch_size(self.engine)
        if self.engine.threads is not None:
            check_range("engine.threads", self.engine.threads, 1, MOST_THREADS)
        if self.resume is None and (self.verify or self.retry is not Retry.unfinished):
            field = "verify=true" if self.verify else f"retry={self.retry.name}"
            raise UserError(f"{field} needs resume=RUN_DIRECTORY (or resume=latest): say which run")


@dataclass(kw_only=True, slots=True)
class ServeConfig(RunConfig):
    """What the command ``serve`` composes: the settings that its runs begin with, and the service's own."""

    server: Server = MISSING


@dataclass(frozen=True, kw_only=True)
class Composed:
    """A composed and validated config on its way into a run: all that a run needs of Hydra, as plain data."""

    config: RunConfig
    directory: Path
    """The run directory, which Hydra has made."""
    there: Path
    """The folder, itself or one above it, that was there before."""
    files: dict[str, str]
    """Name and text of each file of the run's ``.hydra`` folder."""

    def remove_unused_directory(self) -> None:
        """Leave no run directory behind when nothing was written into it."""
        remove_if_empty(self.directory, self.there)


PATHS = (
    "output_file", "output.root", "prompts.path", "prompts.glob", "prompts.template.wildcards", "prompts.masks",
    "model.path", "model.transformer", "model.text_encoder", "model.vae", "model.tokenizer", "model.controlnet",
    "model.cache_dir", "compile.cache_dir", "embedding_cache.path", "skip_existing", "sampling.image", "sampling.mask",
    "sampling.control_image",
)  # fmt: skip
"""Fields that hold a path: ``~`` is the home directory, others are relative to where the program was started."""


def check_home(config: RunConfig) -> None:
    """Raise UserError for a path that begins with ``~`` or ``~name`` where nobody knows that home directory."""
    for name in PATHS:
        value: Any = config
        for step in name.split("."):
            value = getattr(value, step, None)
        if isinstance(value, str):
            at_home(value, name)


def check_loras(config: RunConfig) -> None:
    """Raise UserError for an adapter without a file, or with ``~`` where nobody knows what the home directory is."""
    for place, lora in enumerate(config.loras):
        if not lora.path.strip():
            raise UserError(f"loras.{place}.path='' is empty: name a .safetensors file")
        at_home(lora.path, f"loras.{place}.path")
    for place, folder in enumerate(config.lora_dirs):
        if not folder.strip():
            raise UserError(f"lora_dirs.{place}='' is empty: name a folder")
        at_home(folder, f"lora_dirs.{place}")


def at_home(path: str, field: str) -> str:
    """The path with ``~`` written out. Raises UserError where there is no home directory."""
    expanded = os.path.expanduser(path)
    if expanded == path and (path == "~" or path.startswith("~/")):
        raise UserError(f"{field}={path}: ~ has no meaning here, because HOME is not set: write the whole path")
    if expanded == path and path.startswith("~"):
        raise UserError(f"{field}={path}: {NO_HOME}")
    return expanded


def folder_name(name: str) -> str:
    """``name`` if it is a plain folder name, else UserError. Also a resolver, so that Hydra makes no other folder."""
    if not name or name.startswith(".") or not all(c.isalnum() or c in "._-" for c in name):
        raise UserError(f"name={name!r} is not a folder name: use letters, digits, '.', '-' and '_'")
    return name


def picture_file(name: str, format: Format = Format.png) -> str:
    """``output_file`` with ``~`` expanded, if a picture of this format can have that name."""
    path = Path(name).expanduser()
    if not name.strip():
        raise UserError("output_file='' is empty: name the picture, e.g. output_file=cat.png")
    if path.is_dir() or name.endswith(("/", os.sep)):
        raise UserError(f"output_file={name} is a directory: name the picture, e.g. output_file={path / 'picture.png'}")
    if (kind := unfit_target(path)) is not None:
        raise UserError(f"output_file={name} is {kind}: only plain files are replaced: name another file")
    if (
        there := next((above for above in path.absolute().parents if os.path.exists(above)), None)
    ) and not there.is_dir():
        raise UserError(f"output_file={name}: {there} is no folder: name another file")
    own = {".jpg", ".jpeg"} if format is Format.jpeg else {format.suffix}
    if path.suffix.lower() in PICTURES - own:
        raise UserError(
            f"output_file={name}: pictures are written as {format.name.upper()}: "
            f"use output_file={path.with_suffix(format.suffix)}"
        )
    return str(path)


def check_batch_size(engine: EngineConfig) -> None:
    """A whole number from 1, or auto."""
    size = engine.batch_size
    if size == AUTO:
        return
    if type(size) is not int:
        raise UserError(f"engine.batch_size={size} is neither a whole number nor auto: use e.g. 4, or auto")
    if size < 1:
        raise UserError(f"engine.batch_size={size} is below 1: use 1 or more, or auto")
