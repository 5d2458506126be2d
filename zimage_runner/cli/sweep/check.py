"""What is wrong with jobs of a multirun, told before the first of them begins and not in the middle of the night."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence

from omegaconf import Container, DictConfig

from zimage_runner.cli.messages import CONFIG_ERRORS, explain, typed
from zimage_runner.cli.words import command_line_wins
from zimage_runner.config.schema import RunConfig
from zimage_runner.errors import UserError
from zimage_runner.runner.spec import check

Complaint = tuple[int, str]
"""Number of a job, and why it will be refused."""


def complaints(configs: Sequence[DictConfig]) -> Iterator[Complaint]:
    """Jobs that will be refused, as far as that can be told without reading prompts or weights."""
    for config in configs:
        try:
            command_line_wins(config, config.hydra.overrides.task)
            check(typed_run(config))
        except (UserError, *CONFIG_ERRORS) as error:
            yield config.hydra.job.num, explain(error)


def typed_run(config: DictConfig) -> RunConfig:
    """Return a job's config as the job itself will make it. Raises UserError, or one of CONFIG_ERRORS.

    The part that is Hydra's, which is the larger one, is not copied.
    """
    values = {}
    for name in (field.name for field in dataclasses.fields(RunConfig)):
        value = config[name]
        values[name] = typed(value) if isinstance(value, Container) else value
    return RunConfig(**values)
