"""Every file under conf/ composes into a typed RunConfig the day it is added."""

from __future__ import annotations

from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import MISSING, OmegaConf

from zimage_runner.config import schema
from zimage_runner.config.paths import CONFIG_DIR
from zimage_runner.config.registry import SCHEMAS, register
from zimage_runner.config.schema import RunConfig
from zimage_runner.errors import UserError

OPTIONS = sorted(
    (path.parent.name, path.stem) for path in CONFIG_DIR.glob("*/*.yaml") if path.parent.name != "experiment"
)
EXPERIMENTS = sorted(path.stem for path in CONFIG_DIR.glob("experiment/*.yaml"))
REFUSED_ON_PURPOSE = {"article_verbatim"}
"""Composes, and is then refused with the reasons: the article's script as printed cannot work."""


def composed(*overrides: str, primary: str = "config") -> RunConfig:
    register()
    with initialize_config_dir(str(CONFIG_DIR), version_base="1.3"):
        config = OmegaConf.to_object(compose(primary, list(overrides)))
    assert isinstance(config, RunConfig)
    return config


@pytest.mark.parametrize(("group", "option"), OPTIONS, ids=[f"{g}={o}" for g, o in OPTIONS])
def test_option(group: str, option: str) -> None:
    needs = {"local": ["model.path=."], "file": ["model.path=x.gguf", "model.variant=base"]}.get(option, [])
    primary = "serve" if group == "server" else "config"
    part = getattr(composed(f"{group}={option}", *needs, primary=primary), group)
    assert type(part) in SCHEMAS[group].values()


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_experiment(experiment: str) -> None:
    if experiment in REFUSED_ON_PURPOSE:
        with pytest.raises(UserError):
            composed(f"+experiment={experiment}")
    else:
        assert composed(f"+experiment={experiment}").name


@pytest.mark.parametrize("path", sorted(CONFIG_DIR.rglob("*.yaml")), ids=str)
def test_says_what_it_is(path: Path) -> None:
    first = path.read_text(encoding="utf-8").splitlines()[0]
    assert first.startswith("# ")


def test_a_group_that_is_not_chosen_yet_is_missing_to_omegaconf() -> None:
    assert schema.MISSING == MISSING


def test_every_schema_is_named_by_a_file() -> None:
    texts = "\n".join(path.read_text(encoding="utf-8") for path in CONFIG_DIR.glob("*/*.yaml"))
    for group, options in SCHEMAS.items():
        for name in options:
            assert f"/schema/{group}/{name}@_here_" in texts
