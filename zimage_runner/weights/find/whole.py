"""Whether the weights are whole: every tensor that the configs ask for, of their shapes, in floats, and no others.

Judged by the safetensors headers alone, before anything is loaded, so that no engine can draw from weights that are
incomplete, quantised or another model's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from zimage_runner.errors import UserError, one_line
from zimage_runner.weights.formats.configs import MAX_BLOCKS, Config, expected_shapes
from zimage_runner.weights.safetensors_file import WeightsFile

FLOATS = ("BF16", "F16", "F32", "F64")
UNUSED = {"text_encoder": ("lm_head.", "rotary_emb.inv_freq")}
"""Parts of tensor names that checkpoints carry beside the model itself and that change no picture."""
MARKS = (
    "scale_weight", "weight_scale", "weight_scale_2", "input_scale", "scale_input", "scaled_fp8", "comfy_quant", "SCB",
    "scale", "zero_point", "absmax", "quant_map", "nested_absmax", "nested_quant_map", "qweight", "qzeros", "svd_up",
    "svd_down", "weight_format", "proj_down", "smooth_factor",
)  # fmt: skip
"""Last parts of the names that quantisers give to what belongs to a quantised weight."""
QUANTISED = (
    "quantised weights are not read from a diffusers-format directory, and without their scales they would draw "
    "another picture"
)
OTHER_FILES = "get this model's bfloat16 or float32 files"
WIDEST, MOST_LEVELS, LARGEST_VOCABULARY = 1_000_000, 16, 10_000_000


@dataclass(frozen=True, slots=True)
class Whole:
    """A whole number within bounds."""

    least: int = 1
    most: int = WIDEST

    def fits(self, value: Any) -> bool:
        return type(value) is int and self.least <= value <= self.most

    def __str__(self) -> str:
        return f"a whole number from {self.least} to {self.most}"


@dataclass(frozen=True, slots=True)
class Wholes:
    """A list of them."""

    of: Whole
    shortest: int = 1

    def fits(self, value: Any) -> bool:
        return isinstance(value, list) and self.shortest <= len(value) <= MOST_LEVELS and all(map(self.of.fits, value))

    def __str__(self) -> str:
        return f"a list of {self.shortest} to {MOST_LEVELS} numbers, each {self.of}"


@dataclass(frozen=True, slots=True)
class Real:
    """A finite number above a bound."""

    above: float = 0.0

    def fits(self, value: Any) -> bool:
        return type(value) in (int, float) and self.above < value < 1e12

    def __str__(self) -> str:
        return f"a number above {self.above:g} and below 1e12"


@dataclass(frozen=True, slots=True)
class Flag:
    """true or false."""

    def fits(self, value: Any) -> bool:
        return isinstance(value, bool)

    def __str__(self) -> str:
        return "true or false"


Kind = Whole | Wholes | Real | Flag

REQUIRED: dict[str, dict[str, Kind]] = {
    "transformer": {
        "in_channels": Whole(), "dim": Whole(), "n_layers": Whole(most=MAX_BLOCKS), "n_heads": Whole(),
        "n_refiner_layers": Whole(0, MAX_BLOCKS), "norm_eps": Real(), "cap_feat_dim": Whole(), "rope_theta": Real(),
        "t_scale": Real(), "axes_dims": Wholes(Whole(), 3), "axes_lens": Wholes(Whole(), 3),
    },
    "text_encoder": {
        "vocab_size": Whole(most=LARGEST_VOCABULARY), "hidden_size": Whole(), "intermediate_size": Whole(),
        "num_hidden_layers": Whole(most=MAX_BLOCKS), "num_attention_heads": Whole(), "num_key_value_heads": Whole(),
        "rms_norm_eps": Real(),
    },
    "vae": {
        "latent_channels": Whole(), "block_out_channels": Wholes(Whole()), "layers_per_block": Whole(0, MAX_BLOCKS),
        "norm_num_groups": Whole(), "scaling_factor": Real(),
    },
    "scheduler": {},
}  # fmt: skip
OPTIONAL: dict[str, dict[str, Kind]] = {
    "transformer": {"all_patch_size": Wholes(Whole()), "all_f_patch_size": Wholes(Whole()), "qk_norm": Flag()},
    "text_encoder": {"head_dim": Whole(), "attention_bias": Flag(), "rope_theta": Real()},
    "vae": {
        "in_channels": Whole(), "out_channels": Whole(), "shift_factor": Real(-1e12),
        "mid_block_add_attention": Flag(), "use_quant_conv": Flag(), "use_post_quant_conv": Flag(),
    },
    "scheduler": {"shift": Real(), "num_train_timesteps": Whole(), "use_dynamic_shifting": Flag()},
}  # fmt: skip
"""Fields that may be left out or null: the libraries have a value for them."""
DEFAULTS: dict[str, Config] = {
    "transformer": {"all_patch_size": [2], "all_f_patch_size": [1], "qk_norm": True},
    "text_encoder": {"attention_bias": False, "head_dim": 128},
    "vae": {
        "in_channels": 3, "out_channels": 3, "mid_block_add_attention": True, "use_quant_conv": True,
        "use_post_quant_conv": True,
    },
}  # fmt: skip
"""Those values, where they decide which tensors there are: of diffusers 0.42 and transformers 5."""
FILES = {"scheduler": "scheduler_config.json"}


def check_configs(path: Path, configs: Mapping[str, Config], problems: list[str]) -> None:
    """Report values in the components' configs that no Z-Image can have. Raises UserError for another kind of model."""
    for component, config in configs.items():
        name = f"{component}/{FILES.get(component, 'config.json')}"
        if config.get("quantization_config") is not None:
            raise UserError(f"{path / name}: quantization_config: {QUANTISED}: {OTHER_FILES}")
        for field, kind in REQUIRED[component].items():
            if field not in config:
                problems.append(f"{name} lacks {field}")
            elif not kind.fits(config[field]):
                problems.append(f"{name}: {field}={_shown(config[field])}: need {kind}")
        for field, kind in OPTIONAL[component].items():
            if config.get(field) is not None and not kind.fits(config[field]):
                problems.append(f"{name}: {field}={_shown(config[field])}: need {kind}")
    if not problems:
        _check_kind(path, configs)
        problems += _contradictions(configs)


def _check_kind(path: Path, configs: Mapping[str, Config]) -> None:
    """Raise UserError for what is another kind of model altogether."""
    transformer, vae = configs["transformer"], configs["vae"]
    if transformer.get("siglip_feat_dim") is not None:
        raise UserError(
            f"{path / 'transformer/config.json'}: siglip_feat_dim={_shown(transformer['siglip_feat_dim'])}: an Omni "
            "transformer, which takes pictures as well, is not supported: use Z-Image or Z-Image-Turbo"
        )
    for field, block in (("down_block_types", "DownEncoderBlock2D"), ("up_block_types", "UpDecoderBlock2D")):
        plain = [block] * len(vae["block_out_channels"])
        if vae.get(field, plain) != plain:
            raise UserError(f"{path / 'vae/config.json'}: {field}={_shown(vae[field])}: only {block} is supported")


def _contradictions(configs: Mapping[str, Config]) -> list[str]:
    """Values that are possible alone and not together."""
    transformer, encoder, vae = (configs[name] for name in ("transformer", "text_encoder", "vae"))
    found = []
    axes, head = transformer["axes_dims"], transformer["dim"] / transformer["n_heads"]
    if sum(axes) != head or any(size % 2 for size in axes):
        found.append(f"transformer/config.json: axes_dims={axes}: need even numbers whose sum is dim/n_heads, {head:g}")
    patches = [transformer.get(name) or [1] for name in ("all_patch_size", "all_f_patch_size")]
    if len(patches[0]) != len(patches[1]):
        found.append(f"transformer/config.json: all_patch_size={patches[0]} and all_f_patch_size={patches[1]} differ")
    if transformer["cap_feat_dim"] != encoder["hidden_size"]:
        found.append(
            f"text_encoder/config.json: hidden_size={encoder['hidden_size']}, but the transformer takes captions of "
            f"cap_feat_dim={transformer['cap_feat_dim']}: it is another model's text encoder"
        )
    if encoder["num_attention_heads"] % encoder["num_key_value_heads"]:
        found.append("text_encoder/config.json: num_attention_heads is no multiple of num_key_value_heads")
    if transformer["in_channels"] != vae["latent_channels"]:
        found.append(
            f"vae/config.json: latent_channels={vae['latent_channels']}, but the transformer has "
            f"in_channels={transformer['in_channels']}: it is another model's VAE"
        )
    if any(channels % vae["norm_num_groups"] for channels in vae["block_out_channels"]):
        found.append(
            f"vae/config.json: block_out_channels={vae['block_out_channels']}: need multiples of "
            f"norm_num_groups={vae['norm_num_groups']}"
        )
    return found


def check_tensors(
    path: Path, configs: Mapping[str, Config], weights: Mapping[str, Sequence[WeightsFile]], problems: list[str]
) -> None:
    """Compare each component's tensors with what its config asks for. Raises UserError for quantised weights."""
    for component, files in weights.items():
        given = {name: value for name, value in configs[component].items() if value is not None}
        wanted = expected_shapes(component, DEFAULTS[component] | given)
        _check_component(path, component, files, wanted, problems)


def _check_component(
    path: Path,
    component: str,
    files: Sequence[WeightsFile],
    wanted: Mapping[str, tuple[int, ...]],
    problems: list[str],
) -> None:
    found: dict[str, WeightsFile] = {}
    extra: list[str] = []
    for file in files:
        where = file.path.relative_to(path).as_posix()
        for stored, info in file.tensors.items():
            name = stored.removeprefix("model.") if component == "text_encoder" else stored
            if info.dtype not in FLOATS or stored.rpartition(".")[2] in MARKS:
                remedy = _remedy(component, files)
                raise UserError(f"{path / where}: tensor {_shown(stored)} is {info.dtype}: {QUANTISED}: {remedy}")
            if name in found:
                problems.append(f"{where} holds tensor {_shown(stored)}, which {found[name].path.name} holds too")
            elif name in wanted:
                found[name] = file
                if info.shape != wanted[name]:
                    shapes = f"{list(info.shape)}, its config.json says {list(wanted[name])}"
                    problems.append(f"{where}: tensor {_shown(stored)} has shape {shapes}")
            elif not any(part in name for part in UNUSED.get(component, ())):
                extra.append(f"{where}: tensor {_shown(stored)}")
    missing = [name for name in wanted if name not in found]
    place = files[0].path.relative_to(path).as_posix() if len(files) == 1 else f"{component}/*.safetensors"
    if missing:
        problems.append(f"{place} lacks tensor {_some(missing)} that its config.json asks for")
    if extra:
        problems.append(f"{_some(extra)} belongs to no part of the model that its config.json describes")


def _remedy(component: str, files: Sequence[WeightsFile]) -> str:
    """What to do with quantised weights: a file that can be read by itself is named."""
    from zimage_runner.weights.formats.checkpoint_file import recognise

    try:
        is_readable = len(files) == 1 and component in recognise(files[0].path)
    except UserError:
        is_readable = False
    return f"give the file as what it is, with model.{component}={files[0].path}" if is_readable else OTHER_FILES


def _some(names: Sequence[str]) -> str:
    return names[0] + (f" (and {len(names) - 1} more)" if len(names) > 1 else "")


def _shown(value: object) -> str:
    return one_line(str(value), 100)
