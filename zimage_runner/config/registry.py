"""Every option of every group, on one screen: the schema that each YAML under conf/ names in its defaults list."""

from __future__ import annotations

from functools import cache

from hydra.core.config_store import ConfigNode, ConfigStore
from omegaconf import DictConfig, OmegaConf

from zimage_runner.compile import Full, NoCompile, Regional
from zimage_runner.config.paths import CONFIG_DIR
from zimage_runner.config.schema import RunConfig, ServeConfig, WarmLauncherConfig, at_home, folder_name
from zimage_runner.engines.auto import AutoEngine
from zimage_runner.engines.diffusers.config import DiffusersEngine
from zimage_runner.engines.native.config import NativeEngine
from zimage_runner.executors.inline import InlineExecutorConfig
from zimage_runner.executors.process import ProcessExecutorConfig
from zimage_runner.executors.ray_config import RayExecutorConfig
from zimage_runner.executors.resident import ResidentExecutorConfig
from zimage_runner.memory.policies import (
    Auto,
    GroupOffload,
    ModelOffload,
    Resident,
    SequentialOffload,
    Staged,
    Streamed,
)
from zimage_runner.model import FileModel, Model
from zimage_runner.outputs.config import Output, Shards
from zimage_runner.prompts.csv_file import Csv
from zimage_runner.prompts.files import FileGlob
from zimage_runner.prompts.folder import Folder
from zimage_runner.prompts.hf_dataset import HfDataset
from zimage_runner.prompts.images import Images
from zimage_runner.prompts.inline import Inline
from zimage_runner.prompts.jsonl import Jsonl
from zimage_runner.prompts.parquet import Parquet
from zimage_runner.prompts.stdin import Stdin
from zimage_runner.prompts.text_file import TextFile
from zimage_runner.sampling import Sampling
from zimage_runner.serve.config import Server
from zimage_runner.warmup import Article, Generate, Hardware, NoWarmup

SCHEMAS: dict[str, dict[str, type]] = {
    "model": {"checkpoint": Model, "file": FileModel},
    "engine": {"auto": AutoEngine, "native": NativeEngine, "diffusers": DiffusersEngine},
    "memory": {
        "auto": Auto,
        "resident": Resident,
        "staged": Staged,
        "streamed": Streamed,
        "model_offload": ModelOffload,
        "sequential_offload": SequentialOffload,
        "group_offload": GroupOffload,
    },
    "warmup": {"none": NoWarmup, "hardware": Hardware, "generate": Generate, "article": Article},
    "compile": {"none": NoCompile, "regional": Regional, "full": Full},
    "sampling": {"sampling": Sampling},
    "prompts": {
        "inline": Inline,
        "text_file": TextFile,
        "jsonl": Jsonl,
        "csv": Csv,
        "parquet": Parquet,
        "hf_dataset": HfDataset,
        "files": FileGlob,
        "images": Images,
        "folder": Folder,
        "stdin": Stdin,
    },
    "output": {"folders": Output, "shards": Shards},
    "executor": {
        "inline": InlineExecutorConfig,
        "process": ProcessExecutorConfig,
        "resident": ResidentExecutorConfig,
        "ray": RayExecutorConfig,
    },
    "server": {"server": Server},
}


def register() -> None:
    """Store the schemas under schema/<group>/<option>; calling it twice is harmless."""
    OmegaConf.register_new_resolver("folder_name", lambda name: folder_name(str(name)), replace=True)
    OmegaConf.register_new_resolver("home", lambda path: at_home(str(path), "output.root"), replace=True)
    OmegaConf.register_new_resolver("conf_file", lambda name: str(CONFIG_DIR / name), replace=True)
    _store_schemas()


class Schema(ConfigNode):
    """A schema in Hydra's store. Its fields' types are read when a config is composed with it: those of all schemas
    take a sixth of the time of composing, and most are options that a run does not choose."""

    def __init__(self, name: str, group: str, schema: type) -> None:
        self.name, self.group, self.package, self.provider = name, group, None, None
        self._schema, self._read = schema, list[DictConfig]()  # the list is shared with Hydra's shallow copies

    @property
    def node(self) -> DictConfig:
        if not self._read:
            self._read.append(OmegaConf.structured(self._schema))
        return self._read[0]

    @node.setter
    def node(self, value: DictConfig) -> None:  # by Hydra, in a copy
        self._read = [value]


@cache
def _store_schemas() -> None:
    repository = ConfigStore.instance().repo
    for group, options in {
        "schema": {"run": RunConfig, "serve": ServeConfig},
        "hydra/launcher": {"warm": WarmLauncherConfig},
        **{f"schema/{group}": options for group, options in SCHEMAS.items()},
    }.items():
        place = repository
        for name in group.split("/"):
            place = place.setdefault(name, {})
        place |= {f"{name}.yaml": Schema(f"{name}.yaml", group, schema) for name, schema in options.items()}
