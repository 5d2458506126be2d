"""What every request begins with: the composed settings of the service, which no request changes."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import yaml

from zimage_runner.cli.hydra_patches import to_yaml
from zimage_runner.cli.interpolation import literal
from zimage_runner.cli.resume.saved import root_of
from zimage_runner.config.schema import Composed, RunConfig, ServeConfig
from zimage_runner.errors import UserError
from zimage_runner.executors.base import Executor
from zimage_runner.executors.inline import InlineExecutorConfig
from zimage_runner.executors.process import ProcessExecutorConfig
from zimage_runner.plan.build import padded
from zimage_runner.prompts.base import PromptSource
from zimage_runner.prompts.inline import Inline
from zimage_runner.prompts.notes import once_a_run
from zimage_runner.runner.spec import IDLE_CONTROLNET, RunSpec, plan_run
from zimage_runner.sampling import SamplingParams
from zimage_runner.serve.config import Server, parse_size
from zimage_runner.serve.session import ServedSession
from zimage_runner.warmup import WARMUP_PROMPT, WarmupShape

OF_A_REQUEST = ("prompt", "prompts", "seeds")
OF_A_RUN = ("dry_run", "resume", "continue", "retry", "verify", "skip_existing", "report", "output_file", "hydra")
"""Fields and groups that the service's command line has no use for."""
NOT_SAVED = ("server", *OF_A_REQUEST, "name", "hydra")
"""Words of the command line that are not those of its runs; the token must not get into their files."""


def check_words(words: Sequence[str]) -> None:
    """Raise UserError for a word of the command line that would have no effect."""
    for word in words:
        name = root_of(word)
        if word in ("-m", "--multirun"):
            raise UserError(f"{word}: the service is one process with one model: start one for each")
        if name in OF_A_REQUEST:
            raise UserError(f"{word}: each request says what is drawn: leave it out")
        if name in OF_A_RUN and "=" in word:
            raise UserError(f"{word}: this is of a single run, and the service draws many: leave it out")


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The service's own settings and those of its runs."""

    server: Server
    config: RunConfig
    """Without prompts."""
    files: Mapping[str, str]
    """What a run keeps of its settings, as ``Composed.files``: without the service's own."""
    memo: dict[str, Any] = field(default_factory=dict)
    """What ``plan_run`` found out of the model; complete once an executor was made."""

    @classmethod
    def of(cls, composed: Composed) -> Settings:
        """From the composed command line. Raises UserError."""
        config = composed.config
        assert isinstance(config, ServeConfig)
        if config.memory.staged and not config.memory.streamed:
            raise UserError(
                "memory=staged encodes all prompts before the model is loaded, and requests bring theirs later: "
                "use memory=resident or memory=streamed"
            )
        if type(config.executor) not in (InlineExecutorConfig, ProcessExecutorConfig):
            raise UserError("the service keeps one model: use executor=process or executor=inline, and a service a GPU")
        own = {f.name: getattr(config, f.name) for f in fields(RunConfig)}
        plain = RunConfig(**own | {"prompt": None, "prompts": Inline(), "seeds": 0, "skip_existing": None})
        return cls(server=config.server, config=plain, files=_without_server(composed.files))

    @property
    def root(self) -> Path:
        """Where the runs are."""
        return Path(self.config.output.root).absolute()

    def plan(self, prompts: PromptSource, seeds: Any, **changes: Any) -> RunSpec:
        """Plan what a request asks for; ``changes`` are fields of RunConfig. Raises UserError."""
        with once_a_run(IDLE_CONTROLNET):  # the next request may bring what it follows
            return plan_run(replace(self.config, prompts=prompts, seeds=seeds, **changes), self.memo)

    def executor(self) -> Executor:
        """Make an executor that is warm at the configured shapes once it is started. Raises UserError."""
        config, spec = self.config, self.plan(Inline(texts=[WARMUP_PROMPT]), 0)
        session = functools.partial(ServedSession, config.executor.adapt(spec.session), self.shapes(spec), ())
        return config.executor.create(session, auto_batch=config.engine.auto_batch, health=config.memory.health)

    def shapes(self, spec: RunSpec) -> list[WarmupShape]:
        """Return each size, batch size and caption length to be warm at. Raises UserError for a size."""
        params, engine = spec.plan.items[0].params, self.config.engine
        found: dict[WarmupShape, None] = {}
        for size in [f"{params.width}x{params.height}", *self.server.warm_sizes]:
            width, height = parse_size(size, "server.warm_sizes")
            self.config.model.check_size(height, width)
            sized = replace(params, width=width, height=height)
            for batch in sorted({1, 1 if engine.auto_batch else engine.largest_batch}):
                for place, tokens in enumerate(self.server.warm_caption_tokens):
                    found[self._shape(sized, tokens, batch, whole=place == 0)] = None
        return list(found)

    def _shape(self, params: SamplingParams, tokens: int, batch: int, *, whole: bool) -> WarmupShape:
        longest = params.max_sequence_length
        return WarmupShape(
            params=params,
            caption_tokens=padded(tokens, longest),
            negative_caption_tokens=padded(1, longest) if params.uses_guidance else 0,
            batch_size=batch,
            whole=whole or self.config.compile.specializes or (params.uses_guidance and params.cfg_truncation < 1),
        )

    def files_of_run(self, config: RunConfig) -> dict[str, str]:
        """What the folder ``.hydra`` of a run holds, so that the command line can resume it."""
        saved = yaml.safe_load(self.files["config.yaml"])
        sampling = {f.name: getattr(config.sampling, f.name) for f in fields(config.sampling)}
        saved |= {"name": config.name, "seeds": config.seeds, "prompt": None, "sampling": sampling}
        return {**self.files, "config.yaml": to_yaml(literal(saved))}


def _without_server(files: Mapping[str, str]) -> dict[str, str]:
    """The saved settings without the service's, which may hold a token; of Hydra's own what resuming reads."""
    config, overrides = yaml.safe_load(files["config.yaml"]), yaml.safe_load(files["overrides.yaml"])
    for name in ("server", "prompts"):  # a run's prompts are beside its pictures
        config.pop(name, None)
    kept = [word for word in overrides or [] if root_of(word) not in NOT_SAVED]
    runtime = yaml.safe_load(files["hydra.yaml"])["hydra"]["runtime"]
    choices = {
        group: option
        for group, option in runtime.get("choices", {}).items()
        if group not in ("server", "prompts", "experiment")
    }
    hydra = {"runtime": {**runtime, "choices": {**choices, "prompts": "inline"}}, "overrides": {"task": kept}}
    return {
        **_other_files(files),
        "config.yaml": to_yaml(config),
        "hydra.yaml": to_yaml({"hydra": hydra}),
        "overrides.yaml": to_yaml(kept),
    }


def _other_files(files: Mapping[str, str]) -> dict[str, str]:
    """The user's own config files that resuming reads: none of an experiment, and without the service's fields."""
    kept = {}
    for name, text in files.items():
        if name.startswith("configs/") and not name.startswith(("configs/experiment/", "configs/server/")):
            said = yaml.safe_load(text)
            if isinstance(said, dict) and "server" in said:
                text = to_yaml({key: value for key, value in said.items() if key != "server"})
            kept[name] = text
    return kept
