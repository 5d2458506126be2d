"""Draw a picture again from what its file says about itself, and compare.

    python -m zimage_runner reproduce IMAGE [output_file=AGAIN.png] [model.path=DIR] [engine=...] [field=value ...]

Exit codes: 0 the same pixels, 1 other pixels, 2 the file cannot be reproduced (a line says why).
"""

from __future__ import annotations

import hashlib
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from PIL import Image

from zimage_runner.cli.interpolation import literal
from zimage_runner.cli.messages import CONFIG_ERRORS, explain, typed
from zimage_runner.cli.quoting import quote_free_text
from zimage_runner.cli.resume.saved import override_key
from zimage_runner.config.paths import CONFIG_DIR
from zimage_runner.config.registry import register
from zimage_runner.config.schema import RunConfig
from zimage_runner.errors import EXIT_ITEMS_FAILED, EXIT_OK, UserError, one_line
from zimage_runner.executors.base import Batch
from zimage_runner.logs import command, refuse, say
from zimage_runner.outputs import atomic
from zimage_runner.outputs.config import IMAGE_STEM, Format, Output
from zimage_runner.outputs.encoders import encode
from zimage_runner.outputs.finished import open_picture, shared_picture
from zimage_runner.outputs.metadata import check_recipe, read_metadata
from zimage_runner.pictures.recorded import recorded_controlnet, recorded_values
from zimage_runner.prompts.inline import Inline
from zimage_runner.prompts.picture_values import as_chosen
from zimage_runner.prompts.seeds import parse_seeds
from zimage_runner.runner.loras import recorded_files
from zimage_runner.runner.pool import executor_of_run
from zimage_runner.runner.spec import RunSpec, plan_run
from zimage_runner.sampling import PICTURE_FIELDS, SAMPLING_FIELDS, Sampling

if TYPE_CHECKING:
    import numpy as np

OF_A_RUN = ("prompt", "prompts", "dry_run", "resume", "retry", "verify", "skip_existing", "name", "report")
"""Fields and groups that say what a run draws and how it goes; here the picture does."""
FILE_FIELDS = {f"output.{field.name}" for field in fields(Output) if field.metadata.get("of_file")}
"""Fields of ``output`` that say how output_file is encoded."""
EXIT_SAME, EXIT_DIFFERENT = EXIT_OK, EXIT_ITEMS_FAILED


def main(argv: Sequence[str]) -> int:
    """Run one command line and return its exit code."""
    return command(argv, __doc__, lambda words: reproduce(Path(words[0]), words[1:]))


def reproduce(path: Path, overrides: Sequence[str]) -> int:
    """Draw the picture again, say how it compares, and return the exit code."""
    os.environ["HYDRA_FULL_ERROR"] = "1"
    recipe = read_recipe(path)
    try:
        config = recipe_config(recipe, overrides, str(path))
    except CONFIG_ERRORS as error:
        return refuse(explain(error))
    # a hard link to it is another file: writing replaces the name alone
    if config.output_file is not None and os.path.realpath(config.output_file) == os.path.realpath(path):
        raise UserError(f"output_file={config.output_file} is the picture itself, which stays: name another file")
    spec = plan_run(config)
    pixels, report = _draw(spec)
    if config.output_file is not None:
        _save(Path(config.output_file), pixels, spec, report)
    for line in _changes(recipe, spec, report):
        say(f"  {line}", sys.stdout)
    comparison = compare(path, pixels, recipe.get("pixels_sha256"))
    say(f"{path}: {comparison}", sys.stdout)
    return EXIT_SAME if comparison.is_same else EXIT_DIFFERENT


def read_recipe(path: Path) -> dict[str, Any]:
    """The picture's own recipe. Raises UserError if it has none, or one that is not a recipe."""
    if not path.is_file() and shared_picture(path) is None:
        names = [path / f"{IMAGE_STEM}{format.suffix}" for format in Format]
        there = next((f"the picture in it, {name}" for name in names if name.is_file()), "a picture")
        what = "is no plain file" if path.exists() else "does not exist"
        what = f"is a folder: give {there}" if path.is_dir() else f"{what}: give a picture"
        raise UserError(f"{path} {what}")
    with open_picture(path) as file:
        recipe = read_metadata(file).recipe
    if recipe is None:
        raise UserError(f"{path} carries no zimage_runner metadata: it was made by another tool or stripped of it")
    check_recipe(recipe, str(path))
    return recipe


def recipe_config(recipe: Mapping[str, Any], overrides: Sequence[str], picture: str = "the picture") -> RunConfig:
    """The run that draws this one picture. The file's texts are used as values only, never as commands."""
    given = {override_key(override) for override in overrides}
    of_output = {key for key in given if key.partition(".")[0] == "output"}
    if idle := sorted({key for key in given if key.partition(".")[0] in OF_A_RUN} | (of_output - FILE_FIELDS)):
        raise UserError(f"{idle[0]} has no effect on a picture that is drawn again: leave it out")
    if of_output and "output_file" not in given:
        raise UserError(f"{min(of_output)} has no effect without output_file: name the file to be written")
    chosen = [f"{group}={option}" for group, option in _options(recipe).items() if group not in given]
    register()
    with initialize_config_dir(version_base="1.3", config_dir=str(CONFIG_DIR)):
        composed = compose("config", overrides=[*chosen, "warmup=none", *quote_free_text(overrides)])
    config = typed(composed)
    assert isinstance(config, RunConfig)
    params = {name: literal(value) for name, value in recipe["params"].items() if name in SAMPLING_FIELDS}
    sampling = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(Sampling), params))
    assert isinstance(sampling, Sampling)
    for name in SAMPLING_FIELDS:  # what the user sets wins
        if f"sampling.{name}" in given:
            setattr(sampling, name, getattr(config.sampling, name))
    seeds = config.seeds if "seeds" in given else [recipe["seed"]]
    if (count := len(parse_seeds(seeds))) > 1:
        raise UserError(f"seeds gives {count} pictures, and one is drawn again: give one seed, or none for its own")
    loras = config.loras
    if not any(key.partition(".")[0] == "loras" for key in given):
        loras = recorded_files(recipe.get("loras", []), config.lora_dirs, picture)
    set_anew = frozenset(name for name in PICTURE_FIELDS if f"sampling.{name}" in given)
    inputs = recorded_values(recipe.get("inputs", {}), picture, set_anew)
    for name in PICTURE_FIELDS:
        value = getattr(config.sampling, name) if name in set_anew else inputs.get(name)
        setattr(sampling, name, as_chosen(name, value))
    model = config.model
    if sampling.control_image is not None and "model.controlnet" not in given:
        said = recorded_controlnet(recipe.get("inputs", {}), picture)
        convention = model.controlnet_convention if "model.controlnet_convention" in given else said[1]
        model = replace(model, controlnet=said[0], controlnet_convention=convention)
    prompts = Inline(texts=[recipe["prompt"]])  # its tags, where they were read, are loras now
    lora_dirs = config.lora_dirs if loras else []
    return replace(
        config,
        model=model,
        prompts=prompts,
        prompt=None,
        sampling=sampling,
        seeds=seeds,
        loras=loras,
        lora_dirs=lora_dirs,
    )


def _options(recipe: Mapping[str, Any]) -> dict[str, str]:
    """Config groups and fields that the recipe decides; names that conf/ does not have are left to the user."""
    numerics, model = recipe["numerics"], recipe["model"]
    options = {
        "model": model.get("name"),
        "engine": numerics.get("engine"),
        "compile": numerics.get("compile"),
    }
    found = {
        g: str(o) for g, o in options.items() if str(o).isidentifier() and (CONFIG_DIR / g / f"{o}.yaml").is_file()
    }
    for field, name in (("model.dtype", "dtype"), ("engine.noise_device", "noise_device")):
        if str(numerics.get(name)) in ("float32", "bfloat16", "cpu", "cuda"):
            found[field] = numerics[name]
    if numerics.get("precision") in ("fp8", "int8"):
        found["engine.precision"] = numerics["precision"]
    layers = numerics.get("bf16_layers")
    if isinstance(layers, list) and all(type(layer) is int for layer in layers):
        found["engine.bf16_layers"] = f"[{','.join(map(str, layers))}]"
    return found


def _draw(spec: RunSpec) -> tuple[np.ndarray, dict[str, Any]]:
    with executor_of_run() as executor, executor.lease(spec) as lease:
        for result in lease.run([Batch(items=spec.plan.items[:1])]):
            if result.images is None:
                raise UserError(f"the picture cannot be drawn: {result.error}")
            return result.images.wait()[0], lease.report()
    raise UserError("interrupted before the picture was drawn")


def _save(target: Path, pixels: np.ndarray, spec: RunSpec, report: dict[str, Any]) -> None:
    item = spec.plan.items[0]
    try:
        atomic.replace_file(target, encode(pixels, spec.recipe(item, report), spec.config.output))
    except OSError as error:
        raise UserError(f"output_file={target} cannot be written: {error.strerror}") from None


def _changes(recipe: Mapping[str, Any], spec: RunSpec, report: Mapping[str, Any]) -> list[str]:
    """What is not as it was, for a person who wonders why pixels differ."""
    was = {"seed": recipe["seed"], **recipe["params"], "weights": recipe["model"].get("digest")}
    was |= {**recipe["numerics"], **recipe.get("versions", {}), "loras": _loras(recipe.get("loras"))}
    item = spec.plan.items[0]
    now = {"seed": item.seed, **item.params.to_dict(), "weights": spec.checkpoint.digest}
    now |= {**report["numerics"], **report["versions"], "loras": _loras([lora.record() for lora in item.params.loras])}
    inputs = item.params.inputs.record() if item.params.inputs else {}
    was |= _inputs(recipe.get("inputs", {}), inputs)
    now |= _inputs(inputs, recipe.get("inputs", {}))
    return [f"{k} was {was[k]}, now {now.get(k)}" for k in was if str(was[k]) != str(now.get(k))]


def _inputs(record: object, other: object) -> dict[str, Any]:
    """What a record says of the pictures it started from, files by their digest, and what the other one says alone."""
    values = record if isinstance(record, Mapping) else {}
    names = [*values, *(other if isinstance(other, Mapping) else [])]
    said = {name: values.get(name) for name in names}
    return {n: f"sha256 {str(v.get('digest'))[:8]}" if isinstance(v, Mapping) else v for n, v in said.items()}


def _loras(record: object) -> str:
    entries = record if isinstance(record, list) else []
    said = [(lora.get("digest"), lora.get("weight")) for lora in entries if isinstance(lora, Mapping)]
    return ", ".join(f"{one_line(str(digest), 13)}:{weight}" for digest, weight in said) or "none"


@dataclass(frozen=True, slots=True)
class Comparison:
    """How two pictures differ."""

    is_same: bool
    text: str

    def __str__(self) -> str:
        return self.text


def compare(path: Path, pixels: np.ndarray, drawn_sha256: str | None = None) -> Comparison:
    """Compare a file's pixels with uint8 [height, width, 3].

    drawn_sha256: digest of the pixels as they were drawn, which a format with loss does not hold any more.
    """
    import numpy as np

    if drawn_sha256 == hashlib.sha256(pixels.tobytes()).hexdigest():
        return Comparison(True, "identical")

    with open_picture(path) as file, Image.open(file) as image:
        was = np.asarray(image.convert("RGB"))
    if was.shape != pixels.shape:
        return Comparison(False, f"another size: was {was.shape[1]}x{was.shape[0]}")
    if np.array_equal(was, pixels):
        return Comparison(True, "identical")
    difference = np.abs(was.astype(np.int16) - pixels.astype(np.int16))
    psnr = 10 * np.log10(255.0**2 / np.mean(difference.astype(np.float64) ** 2))
    share = np.mean(difference.max(axis=-1) > 0)
    return Comparison(
        False,
        f"not identical: {share:.2%} of the pixels differ, at most by {difference.max()} of 255, PSNR {psnr:.1f} dB",
    )


if __name__ == "__main__":
    from zimage_runner.startup.process import begin

    begin()
    sys.exit(main(sys.argv[1:]))
