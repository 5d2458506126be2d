"""What a request may say: a fixed set of fields, each checked before anything is planned.

Nothing a request holds is opened, composed or looked up: no path, no URL, no YAML, no interpolation.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, ClassVar, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, StrictBool, StrictFloat, StrictInt, StrictStr, ValidationError

from zimage_runner.errors import UserError
from zimage_runner.outputs.config import Format, Output, check_quality
from zimage_runner.prompts.base import Prompt
from zimage_runner.prompts.inline import Inline
from zimage_runner.prompts.picture_values import as_chosen, finite, short
from zimage_runner.prompts.rows import RowReader, TableSource, convert
from zimage_runner.prompts.seeds import MAX_SEED, TooManySeeds, parse_seeds
from zimage_runner.runner.spec import RunSpec
from zimage_runner.sampling import MAX_SIDE, PICTURE_FIELDS, PICTURE_FILES, SAMPLING_FIELDS, Sampling
from zimage_runner.serve.config import Server, parse_size
from zimage_runner.serve.errors import ApiError
from zimage_runner.serve.settings import Settings

DRAWN_SEED_BITS = 32
"""Of a seed that the service draws: short enough for every tool."""
OF_A_ROW = frozenset({"text", "prompt", "id", "seed", "seeds", "metadata", *SAMPLING_FIELDS})


class _Request(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)
    files: ClassVar[tuple[str, ...]] = ()
    """Files that are sent beside the fields."""


Asked = TypeVar("Asked", bound=_Request)
Planned = tuple[RunSpec, Output]
"""The pictures of a request, and how they are encoded."""


class Generation(_Request):
    """Body of POST /v1/images/generations: OpenAI's fields, then those that other servers of such models accept.

    Fields of OpenAI's that this model has no use for are taken at their neutral values alone.
    """

    prompt: StrictStr
    model: StrictStr | None = None
    n: StrictInt | None = None
    size: StrictStr | None = None
    response_format: Literal["b64_json", "url"] | None = None
    output_format: Literal["png", "jpeg", "webp"] | None = None
    output_compression: StrictInt | None = None
    user: StrictStr | None = None
    background: Literal["auto", "opaque"] | None = None
    moderation: Literal["auto", "low"] | None = None
    quality: Literal["auto", "standard"] | None = None
    stream: StrictBool | None = None
    seed: StrictInt | None = None
    num_inference_steps: StrictInt | None = None
    guidance_scale: StrictFloat | StrictInt | None = None
    negative_prompt: StrictStr | None = None


class Edit(Generation):
    """Fields of POST /v1/images/edits: besides those of a generation, those of ``Sampling`` about pictures.

    Not its ``tile`` and ``variation``: small tiles would keep the model busy for hours, and a variation is no edit.
    """

    files: ClassVar[tuple[str, ...]] = PICTURE_FILES
    strength: StrictFloat | None = None
    steps_after_strength: StrictBool | None = None
    fit: Literal["crop", "pad", "stretch"] | None = None
    scale: StrictFloat | None = None
    mask_blur: StrictInt | None = None
    mask_grow: StrictInt | None = None
    mask_crop: StrictInt | None = None
    outpaint: StrictStr | None = None
    control_scale: StrictFloat | None = None
    control_preprocess: Literal["none", "canny"] | None = None
    control_start: StrictFloat | None = None
    control_end: StrictFloat | None = None
    canny_low: StrictInt | None = None
    canny_high: StrictInt | None = None

    def of_pictures(self) -> dict[str, Any]:
        """What it says about pictures, as fields of ``Sampling``."""
        said = {name: getattr(self, name, None) for name in PICTURE_FIELDS}
        return {name: as_chosen(name, value) for name, value in said.items() if value is not None}


class RunRequest(_Request):
    """Body of POST /v1/runs."""

    prompts: list[StrictStr | dict[str, Any]]
    seeds: StrictInt | StrictStr | list[StrictInt | StrictStr] | dict[str, Any] | None = None
    sampling: dict[str, Any] = {}
    name: StrictStr | None = None


def parse(kind: type[Asked], body: Any) -> Asked:
    """A request's JSON, or the texts of a form, as its fields. Raises ApiError naming the first that is wrong."""
    if not isinstance(body, dict):
        raise ApiError(400, "the body is no JSON object: send {...}")
    try:
        return kind.model_validate_strings(body) if kind.files else kind.model_validate(body)  # files come in forms
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        name = str(first["loc"][0]) if first["loc"] else None
        if first["type"] == "extra_forbidden":
            raise ApiError(400, f"{name}: {_why_not(name, (*kind.files, *kind.model_fields))}", param=name) from None
        raise ApiError(400, f"{name}: {first['msg']}", param=name) from None


@dataclass(kw_only=True, slots=True)
class Rows(TableSource):
    """Prompts of a request: texts, or objects with fields of their own."""

    rows: list[Any] = field(default_factory=list)

    def read(self) -> Iterator[Prompt]:
        if not self.rows:
            raise UserError("prompts is empty: send at least one")
        reader = RowReader(self)
        for place, row in enumerate(self.rows):
            where = f"prompts[{place}]"
            row = {"text": row} if isinstance(row, str) else row
            if unknown := set(row) - OF_A_ROW:
                raise UserError(f"{where}: {min(unknown)!r}: {_why_not(min(unknown), sorted(OF_A_ROW))}")
            yield reader.prompt(row, where)


def _why_not(name: str | None, known: Iterable[str]) -> str:
    """Why a request may not say this."""
    if name in PICTURE_FILES:
        return "no request names a file, and a run starts from no picture: /v1/images/edits takes the picture itself"
    return f"no such field; fields here: {', '.join(known)}"


def plan_generation(asked: Generation, settings: Settings, **pictures: Any) -> Planned:
    """Plan a request; ``pictures`` are fields of ``Sampling`` about what it starts from. Raises ApiError."""
    server, model = settings.server, settings.config.model
    if asked.model is not None and asked.model != model.name:
        raise ApiError(
            404,
            f"model={asked.model[:80]!r}: this service draws with {model.name!r}",
            param="model",
            code="model_not_found",
        )
    if asked.stream:
        raise ApiError(400, "stream=true: pictures are not sent in parts: leave it out", param="stream")
    n = 1 if asked.n is None else asked.n
    if not 1 <= n <= server.max_images:
        raise ApiError(400 if n < 1 else 413, f"n={n}: ask for 1 to {server.max_images} pictures", param="n")
    changes = {name: getattr(asked, name) for name in ("num_inference_steps", "guidance_scale", "negative_prompt")}
    seed = secrets.randbits(DRAWN_SEED_BITS) if asked.seed is None else asked.seed
    if not 0 <= seed <= MAX_SEED - n + 1:
        raise ApiError(400, f"seed={seed} is out of range: use 0 to {MAX_SEED - n + 1}", param="seed")
    try:
        if asked.size not in (None, "auto"):
            changes["width"], changes["height"] = parse_size(asked.size, "size")
        _check_asked({"prompt": asked.prompt, **changes}, server)
        sampling = replace(sampling_of(changes, settings.config.sampling), **pictures)
        output = _output(asked, settings.config.output)
        spec = settings.plan(Inline(texts=[asked.prompt]), {"count": n, "base": seed}, sampling=sampling)
    except UserError as error:
        raise _named_as_asked(error, asked) from None
    check_limits(spec, server)
    return spec, output


def _named_as_asked(error: UserError, asked: Generation) -> ApiError:
    """The same line about the request's own fields, which know no group ``sampling`` and one prompt."""
    text = re.sub(r"(?<![\w./'])sampling(?:\.(?=\w+=)|: )", "", " ".join(str(error).split()))
    text = text.removeprefix("prompts.texts[0]: ")
    word = re.split(r"\W", text, maxsplit=1)[0]
    param = "size" if word in ("width", "height") else word
    return ApiError(400, text, param=param if param in type(asked).model_fields else None)


def plan_run_request(asked: RunRequest, settings: Settings, **changes: Any) -> RunSpec:
    """The plan of a run. ``changes`` are further fields of RunConfig. Raises ApiError, UserError."""
    server = settings.server
    rows, seeds = Rows(rows=list(asked.prompts)), 0 if asked.seeds is None else asked.seeds
    for said in (asked.sampling, *asked.prompts):
        _check_asked({"prompt": said} if isinstance(said, str) else said, server)
    try:
        each, count = len(parse_seeds(seeds)), 0
        for prompt in rows.read():  # before they are all in memory
            count += each if prompt.seeds is None else len(prompt.seeds)
            if count > server.max_run_images:
                raise ApiError(413, f"the run has more than {server.max_run_images:,} pictures", param="prompts")
    except TooManySeeds as error:
        raise ApiError(413, str(error), param="seeds") from None
    sampling = sampling_of(asked.sampling, settings.config.sampling)
    name = settings.config.name if asked.name is None else asked.name
    spec = settings.plan(rows, seeds, sampling=sampling, name=name, **changes)
    check_limits(spec, server)
    return spec


def sampling_of(given: Mapping[str, Any], sampling: Sampling) -> Sampling:
    """The service's sampling fields with a request's in their place. Raises UserError."""
    if unknown := set(given) - set(SAMPLING_FIELDS):
        raise UserError(f"sampling.{min(unknown)}: {_why_not(min(unknown), SAMPLING_FIELDS)}")
    changes = {name: convert(name, value, "sampling") for name, value in given.items() if value is not None}
    return replace(sampling, **changes)


def check_limits(spec: RunSpec, server: Server) -> None:
    """Raise ApiError for a plan with a picture that is larger than the service draws."""
    for params in spec.plan.params():
        finished = params.inputs.result if params.inputs else None
        for width, height in ((params.width, params.height), finished or (0, 0)):
            if height * width > server.max_megapixels * 1e6:
                raise _too_large(width, height, server)
        _check_steps(params.num_inference_steps, server)
        _check_length("negative_prompt", params.negative_prompt, server)
    for prompt in spec.plan.prompts:
        _check_length("prompt", prompt.text, server)


def _check_asked(said: Mapping[str, Any], server: Server) -> None:
    """Raise ApiError for what is too large. Before the plan, whose own limits would be told with another status."""
    steps, height, width = (finite(said.get(name)) for name in ("num_inference_steps", "height", "width"))
    if steps is not None:
        _check_steps(steps, server)
    if height and width and height * width > server.max_megapixels * 1e6:
        raise _too_large(width, height, server)
    for name, side in (("height", height), ("width", width)):
        if side is not None and side > MAX_SIDE:
            raise ApiError(413, f"{name}={short(side)}: ask for at most {MAX_SIDE} pixels", param="size")
    for name in ("prompt", "text", "negative_prompt"):
        if isinstance(text := said.get(name), str):
            _check_length(name, text, server)


def _check_steps(steps: float, server: Server) -> None:
    if steps > server.max_steps:
        message = f"num_inference_steps={short(steps)}: ask for at most {server.max_steps}"
        raise ApiError(413, message, param="num_inference_steps")


def _too_large(width: float, height: float, server: Server) -> ApiError:
    most = server.max_megapixels
    return ApiError(413, f"size={short(width)}x{short(height)}: ask for at most {most:g} million pixels", param="size")


def _check_length(name: str, text: str, server: Server) -> None:
    if len(text) > server.max_prompt_characters:
        most = server.max_prompt_characters
        raise ApiError(413, f"{name} has {len(text):,} characters: send at most {most:,}", param=name)


def _output(asked: Generation, output: Output) -> Output:
    """How a request's pictures are encoded."""
    if asked.output_format is None and asked.output_compression is None:
        return output
    kind = output.format if asked.output_format is None else Format[asked.output_format]
    quality = asked.output_compression
    check_quality("output_compression", kind, quality)
    own = {f.name: getattr(output, f.name) for f in fields(output)}
    level = own["png_compress_level"] if kind is Format.png else 1
    return type(output)(**own | {"format": kind, "quality": quality, "png_compress_level": level})
