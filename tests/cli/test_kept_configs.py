"""What is kept of composing, and copies that are made quickly, are what Hydra and OmegaConf would have made."""

from __future__ import annotations

import copy
import itertools
import pickle
import subprocess
import sys
from enum import Enum
from pathlib import Path
from typing import Any
from unittest.mock import Mock, patch

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.base import Node

from zimage_runner.cli.hydra_patches import Kept, copied_quickly
from zimage_runner.cli.sweep.launcher import register_launcher
from zimage_runner.config.paths import CONFIG_DIR
from zimage_runner.config.registry import register

COMMAND_LINES = [
    [],
    ["model=zimage_turbo", "memory=staged", "seeds=[1,2]"],
    ["+experiment=quickstart", "prompt=a"],
    ["+experiment=article", "engine=diffusers", "name=x"],
    ["+experiment=mine", "prompts.texts=[a]"],
    ["model=own", "+experiment=mine"],
]


def described(node: Any, parent: Any = None) -> Any:
    """All that OmegaConf knows of a node and of those below it."""
    if not isinstance(node, Node):
        return node
    state = node.__dict__
    assert parent is None or state["_parent"] is parent
    metadata = vars(state["_metadata"])
    known = {name: metadata[name] for name in metadata if name not in ("flags", "resolver_cache")}
    known |= {"flags": metadata["flags"] or {}, "cache": {k: v for k, v in metadata["resolver_cache"].items() if v}}
    content: Any = state.get("_content", state.get("_val"))
    if isinstance(content, dict):
        content = {key: described(value, node) for key, value in content.items()}
    elif isinstance(content, list):
        content = [described(value, node) for value in content]
    return type(node), known, described(content)


def composed(folder: Path, words: list[str]) -> DictConfig:
    with initialize_config_dir(str(CONFIG_DIR), version_base="1.3"):
        others = [f"hydra.searchpath=[file://{folder}]"] if "+experiment=mine" in words else []
        return compose("config", [*words, *others], return_hydra_config=True)


def write_own(folder: Path) -> None:
    (folder / "experiment").mkdir()
    (folder / "model").mkdir()
    (folder / "experiment" / "mine.yaml").write_text(
        "# @package _global_\ndefaults:\n  - override /memory: staged\nsampling:\n  num_inference_steps: 3\n",
        encoding="utf-8",
    )
    (folder / "model" / "own.yaml").write_text("defaults:\n  - zimage_nano\nname: own\n", encoding="utf-8")


def test_a_command_line_composes_the_same_first_and_later(tmp_path: Path):
    """In a process that has kept nothing yet."""
    write_own(tmp_path)
    code = (
        "import sys; from pathlib import Path; from tests.cli import test_kept_configs as here;"
        "here.compare(Path(sys.argv[1]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=120,
        cwd=Path(__file__).parents[2],
        encoding="utf-8",
    )
    assert (done.returncode, done.stdout) == (0, f"{len(COMMAND_LINES)} the same\n"), done.stderr


def compare(folder: Path) -> None:
    from zimage_runner.cli.hydra_patches import keep_what_was_composed

    register()
    register_launcher()
    clock = itertools.count()
    with patch("hydra.core.utils.datetime", Mock(now=lambda: Mock(strftime=lambda _: str(next(clock))))):
        plain = [composed(folder, words) for words in COMMAND_LINES]
        seen = {time for config in plain for time in times_of(config)}
        assert seen, "composing looks the time up"
        for config in plain:
            OmegaConf.clear_cache(config)
        expected = [described(config) for config in plain]
        keep_what_was_composed()
        for words, was in [*zip(COMMAND_LINES, expected, strict=True)] * 2:  # then from what the first has kept
            with copied_quickly():
                config = composed(folder, words)
            times = times_of(config)
            assert not seen & times, "a time of an earlier command line"
            seen |= times
            OmegaConf.clear_cache(config)
            assert described(config) == was, words
            config.sampling.width = 16  # a config is its own
            config.hydra.job.name = "changed"
    print(len(plain), "the same")


def times_of(config: DictConfig) -> set[str]:
    return set(config._metadata.resolver_cache["now"].values())


class Colour(Enum):
    red = 1


@pytest.fixture
def config() -> DictConfig:
    register()
    with initialize_config_dir(str(CONFIG_DIR), version_base="1.3"):
        made = compose("config", ["prompts.texts=[a,b]", "+seeds_by.odd=1"], return_hydra_config=True)
    OmegaConf.set_struct(made, False)
    made["more"] = {"when": "${now:%Y-%f}", "list": [1, None, {"a": "???"}], "colour": Colour.red, "bytes": b"1"}
    more = made["more"]
    assert more.when  # which the config remembers from now on
    OmegaConf.set_readonly(more, True)
    return made


def test_a_quick_copy_is_omegaconfs_own(config: DictConfig):
    expected = described(copy.deepcopy(config))
    with copied_quickly():
        for copied in (copy.deepcopy(config), Kept(config).new()):
            assert described(copied) == expected == described(config)
            assert copied.more.when == config.more.when
            copied.prompts.texts.append("c")
            assert list(config.prompts.texts) == ["a", "b"]


def test_a_part_keeps_its_parent_and_copies_nothing_of_it(config: DictConfig):
    with copied_quickly():
        part = copy.deepcopy(config.hydra)
    assert part._get_parent() is config
    assert described(part) == described(config.hydra)
    assert part.run.dir == config.hydra.run.dir  # found through the parent


def test_what_pickle_cannot_write_is_copied_as_ever():
    class Local(Enum):
        one = 1

    config = OmegaConf.create({"value": Local.one, "list": ListConfig([1])})
    with pytest.raises((AttributeError, pickle.PicklingError)):
        pickle.dumps(config)
    with copied_quickly():
        for copied in (copy.deepcopy(config), Kept(config).new()):
            assert copied == config
            assert copied is not config
            assert copied.value is Local.one
    assert DictConfig.__deepcopy__.__module__ == "omegaconf.dictconfig"
