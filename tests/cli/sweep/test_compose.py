"""Composing quickly gives what Hydra gives."""

from __future__ import annotations

import pytest
from hydra import initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.utils import setup_globals
from hydra.types import RunMode
from omegaconf import OmegaConf

from zimage_runner.cli.hydra_patches import to_yaml
from zimage_runner.cli.sweep.composer import SweepComposer
from zimage_runner.config.paths import CONFIG_DIR
from zimage_runner.config.registry import register

MASTER = [
    "+experiment=quickstart",
    "hydra.sweep.dir=somewhere",
    "sampling.num_inference_steps=1,2",
    "model=zimage_nano",
]


@pytest.fixture
def loader():
    register()
    setup_globals()
    with initialize_config_dir(version_base="1.3", config_dir=str(CONFIG_DIR)):
        yield GlobalHydra.instance().config_loader()


@pytest.mark.parametrize(
    "overrides",
    [
        ["+experiment=quickstart", "sampling.num_inference_steps=2", "model=zimage_nano"],
        ["+experiment=quickstart", "sampling.num_inference_steps=4", "model=zimage_turbo", "seeds=[1,2]"],
        ["+experiment=quickstart", "warmup=none", "name=x", "sampling.width=64", "prompts.texts=[a,b]"],
        ["+experiment=quickstart", "sampling.negative_prompt=null", 'seeds="{count:3,derive:prompt}"'],
        ["+prompts.template.fill.subject=[cat,dog]", 'prompt="a, (b) 猫"', "name=${oc.env:NOTHING,y}"],
    ],
)
def test_same_as_hydra(loader, overrides):
    master = loader.load_configuration("config", MASTER, run_mode=RunMode.MULTIRUN)
    expected = loader.load_sweep_config(master, overrides)
    composer = SweepComposer(loader)
    for _ in range(3):  # new, kept from the check, and new from the same base
        config = composer(master, overrides)
        assert OmegaConf.to_container(config) == OmegaConf.to_container(expected)
        assert config.hydra.job.override_dirname == expected.hydra.job.override_dirname
        assert OmegaConf.is_struct(config)
        assert OmegaConf.get_type(config, "sampling") is OmegaConf.get_type(expected, "sampling")
        config.sampling.width = 16  # a job's config is its own


@pytest.mark.parametrize("override", ["sampling.num_inference_steps=four", "sampling.stepz=4", "model=none_such"])
def test_errors_are_hydras(loader, override):
    master = loader.load_configuration("config", MASTER, run_mode=RunMode.MULTIRUN)
    with pytest.raises(Exception) as expected:  # noqa: PT011
        loader.load_sweep_config(master, [override])
    with pytest.raises(type(expected.value)):
        SweepComposer(loader)(master, [override])


def test_fast_yaml_reads_back_the_same(loader):
    config = loader.load_configuration("config", ["+experiment=quickstart"], run_mode=RunMode.RUN)
    values = [
        "1e3",
        "0x10",
        "true",
        "Null",
        "3.0",
        "nan",
        "a: b",
        "- x",
        "é猫",
        "",
        " x",
        "'",
        '"',
        "#",
        "a\nb",
    ]
    texts = OmegaConf.create({"texts": values, "config": config})
    assert OmegaConf.create(to_yaml(texts)) == OmegaConf.create(OmegaConf.to_yaml(texts))
    assert OmegaConf.create(to_yaml(texts)).texts == values
