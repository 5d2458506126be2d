"""A config is composed once where Hydra would compose it twice, and the outcome is the same."""

from __future__ import annotations

import logging
import subprocess
import sys

import pytest
from hydra._internal.hydra import Hydra
from omegaconf import OmegaConf

from zimage_runner.cli import hydra_patches
from zimage_runner.config.paths import CONFIG_DIR

PLAIN = ["prompt=a fox", "dry_run=true", "model=zimage_nano"]
EXPERIMENTS = sorted(path.stem for path in (CONFIG_DIR / "experiment").glob("*.yaml"))


@pytest.fixture
def compositions(monkeypatch):
    """The overrides of each composition of Hydra's application object."""
    seen = []
    compose_config = Hydra.compose_config

    def spy(self, *args, **kwargs):
        seen.append(list(kwargs["overrides"]))
        return compose_config(self, *args, **kwargs)

    monkeypatch.setattr(Hydra, "compose_config", spy)
    # --info of an earlier test leaves Hydra's log at DEBUG, for which it composes twice more.
    monkeypatch.setattr(logging.getLogger(Hydra.__module__), "isEnabledFor", lambda level: level > logging.DEBUG)
    return seen


@pytest.mark.parametrize("more", [[], ["hydra.run.dir=here"], ["continue=here"]])
def test_once_for_ordinary_command_lines(cli, compositions, more):
    words = [*PLAIN, *more]
    assert cli(*words)[0] == 0
    assert compositions == [[*compositions[0][: len(words)], "hydra.mode=RUN"]]
    assert Hydra.get_mode is not hydra_patches._mode_not_configured


def test_the_mode_is_read_where_it_can_be_set(cli, compositions):
    code, out, _ = cli(*PLAIN, "hydra.mode=MULTIRUN", "seeds=1,2")
    assert code == 0
    assert out.count("prompts to encode") == 2
    assert len(compositions) == 2


def test_a_mode_in_ones_own_config_counts(cli, tmp_path):
    mine = tmp_path / "mine" / "experiment"
    mine.mkdir(parents=True)
    text = "# @package _global_\nhydra:\n  mode: MULTIRUN\n  sweeper:\n    params:\n      seeds: 1,2,3\n"
    (mine / "swept.yaml").write_text(text, encoding="utf-8")
    code, out, err = cli(f"--config-dir={tmp_path / 'mine'}", "+experiment=swept", *PLAIN)
    assert code == 0, err
    assert out.count("prompts to encode") == 3


@pytest.mark.parametrize("experiment", [None, *EXPERIMENTS])
def test_nothing_under_conf_sets_the_mode(experiment):
    """What composing once relies on."""
    from hydra import compose, initialize_config_dir

    from zimage_runner.cli.sweep.launcher import register_launcher
    from zimage_runner.config.registry import register

    register()
    register_launcher()
    with initialize_config_dir(str(CONFIG_DIR), version_base="1.3"):
        overrides = [f"+experiment={experiment}"] if experiment else []
        config = compose("config", overrides, return_hydra_config=True)
    assert OmegaConf.is_missing(config.hydra, "mode") or config.hydra.mode is None


def test_a_config_error_imports_nothing_for_pictures():
    code = (
        "import sys; from zimage_runner.cli.main import main; assert main(['sampling.steps=four']) == 2;"
        "print({'torch', 'numpy', 'PIL', 'tokenizers', 'tqdm', 'email', 'http', 'ssl', 'asyncio',"
        " 'zimage_runner.runner.execute', 'zimage_runner.session', 'zimage_runner.outputs.writer'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, encoding="utf-8")
    assert done.stdout.strip() == "set()", done
