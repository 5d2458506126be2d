"""Pictures that are sent to be edited: a form's files, what is drawn from them, and what is refused."""

from __future__ import annotations

import base64
import hashlib
import io
import threading
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image

from tests.support.controlnets import write_controlnet
from tests.support.drawing import SMALL, session_config
from tests.support.faulty_session import item
from tests.support.gated_session import GatedSession
from tests.support.serving import settings
from zimage_runner.engines.base import Engine, GeneratedBatch
from zimage_runner.engines.native.config import NativeEngine
from zimage_runner.errors import UserError
from zimage_runner.executors.backoff import MemoryBackoff
from zimage_runner.executors.base import Batch
from zimage_runner.memory.policies import Resident
from zimage_runner.model import Device
from zimage_runner.outputs.metadata import read_metadata
from zimage_runner.pictures.placed import Placed, place
from zimage_runner.plan import WorkItem
from zimage_runner.prompts.inline import Inline
from zimage_runner.serve.edits import Upload, plan_edit
from zimage_runner.serve.fields import Edit, Generation, parse
from zimage_runner.serve.run_files import FOLDER
from zimage_runner.serve.session import ServedSession
from zimage_runner.session import Session
from zimage_runner.warmup import Generate, WarmupShape

ROUTE = "/v1/images/edits"
UPLOADS = Path("outputs", FOLDER, "uploads")


def encoded(image: Image.Image, format: str = "PNG", **options: Any) -> bytes:
    stream = io.BytesIO()
    image.save(stream, format, **options)
    return stream.getvalue()


def half_transparent(size: tuple[int, int] = (48, 32)) -> bytes:
    """Black, and transparent in its right half."""
    image = Image.new("RGBA", size, (0, 0, 0, 255))
    image.paste((0, 0, 0, 0), (size[0] // 2, 0, *size))
    return encoded(image)


CAT = encoded(Image.linear_gradient("L").resize((48, 32)).convert("RGB"))


FINE = {"prompt": "a cat"}


def image(data: bytes = CAT) -> dict[str, Any]:
    return {"image": ("cat.png", data)}


class PictureSession(GatedSession):
    """Notes what each item starts from, read when it is drawn."""

    placed: list[Placed] = []  # noqa: RUF012

    def generate(self, items: Sequence[WorkItem], *, attempt: int = 1, tiled: bool = False) -> GeneratedBatch:
        for params in (one.params for one in items):
            inputs = params.inputs
            assert inputs is not None
            assert inputs.image is not None
            assert Path(inputs.image.path).parent.stat().st_mode & 0o77 == 0
            self.placed.append(place(inputs, params.width, params.height))
        return super().generate(items, attempt=attempt, tiled=tiled)


@pytest.fixture
def placed(monkeypatch: pytest.MonkeyPatch) -> list[Placed]:
    monkeypatch.setattr("zimage_runner.serve.settings.ServedSession", PictureSession)
    monkeypatch.setattr(PictureSession, "placed", [])
    return PictureSession.placed


def test_a_picture_is_drawn_from_in_its_own_size_and_is_gone_afterwards(serve, placed):
    client = serve()
    fields = {"prompt": "一只猫", "seed": "7", "n": "2", "strength": "0.4", "num_inference_steps": "5"}
    answer = client.post(ROUTE, data=fields, files={"image": ("../secret/my cat.png", CAT)})
    assert answer.status_code == 200, answer.text
    assert (answer.json()["size"], [entry["seed"] for entry in answer.json()["data"]]) == ("48x32", [7, 8])
    for one in placed:
        assert one.mask is None
        assert np.array_equal(one.pixels, np.asarray(Image.open(io.BytesIO(CAT))))
    recipe = read_metadata(io.BytesIO(base64.b64decode(answer.json()["data"][0]["b64_json"]))).recipe
    assert recipe is not None
    assert (recipe["prompt"], recipe["params"]["num_inference_steps"]) == ("一只猫", 5)
    assert recipe["inputs"]["strength"] == 0.4
    assert recipe["inputs"]["image"] == {
        "path": "my cat.png", "digest": hashlib.sha256(CAT).hexdigest(), "width": 48, "height": 32,
    }  # fmt: skip
    assert list(UPLOADS.iterdir()) == []


def test_what_the_mask_leaves_transparent_is_painted(serve, placed):
    client = serve()
    files = {"image[]": ("cat.png", CAT), "mask": ("mask.png", half_transparent())}
    answer = client.post(ROUTE, data={"prompt": "a hat", "size": "96x64"}, files=files)
    assert answer.json()["size"] == "96x64"
    (one,) = placed
    assert one.pixels is not None
    assert one.mask is not None
    assert one.pixels.shape == (64, 96, 3)
    assert (one.mask[:, :46] == 0).all()
    assert (one.mask[:, 54:] == 1).all()


def test_every_field_about_pictures_is_taken(tmp_path, caplog):
    net = str(write_controlnet(tmp_path / "net.safetensors", "2.1"))
    model = replace((given := settings()).config.model, controlnet=net)
    uploads = {name: Upload(f"{name}.png", CAT) for name in ("image", "control_image")}
    uploads["mask"] = Upload("mask.png", half_transparent())
    texts = {
        "prompt": "a cat", "strength": "0.5", "steps_after_strength": "true", "fit": "pad", "mask_blur": "1",
        "mask_grow": "2", "mask_crop": "3", "outpaint": "16,0,16,0", "control_scale": "0.9",
        "control_preprocess": "canny", "control_start": "0.1", "control_end": "0.8", "canny_low": "50",
        "canny_high": "90",
    }  # fmt: skip
    assert texts.keys() - FINE.keys() | {"scale"} == Edit.model_fields.keys() - Generation.model_fields.keys()
    served = replace(given, config=replace(given.config, model=model), memo={})
    spec, _ = plan_edit(parse(Edit, texts), uploads, str(tmp_path), served)
    inputs = spec.plan.items[0].params.inputs
    assert inputs is not None
    counts = {name: value for name, value in inputs.counts().items() if name in texts}
    assert counts == {"outpaint": [16, 0, 16, 0]} | {
        name: yaml.safe_load(text) for name, text in texts.items() if name not in ("prompt", "outpaint")
    }
    assert (inputs.result, inputs.files.keys()) == ((80, 32), uploads.keys())
    served.plan(Inline(texts=["a cat"]), 0)
    assert caplog.text == "", "a ControlNet that waits for a request with a control picture is as it should be"


def test_a_picture_is_drawn_larger_from_itself(serve, placed):
    answer = serve().post(ROUTE, data={**FINE, "scale": "2"}, files=image())
    assert answer.json()["size"] == "96x64"


def test_no_file_stays_where_no_picture_comes(serve, placed, monkeypatch):
    gate = threading.Semaphore(0)
    monkeypatch.setattr(GatedSession, "gate", gate)
    client = serve(request_timeout_s=0.2)
    late = client.post(ROUTE, data={**FINE, "n": "3"}, files=image())
    assert (late.status_code, list(UPLOADS.iterdir())) == (504, [])
    gate.release(100)


def test_weights_that_cannot_start_from_pictures_are_no_lost_model(monkeypatch):
    def refuse(*_: Any, **__: Any) -> None:
        raise UserError("engine=diffusers does not draw from pictures")

    monkeypatch.setattr(Session, "generate", refuse)
    backoff = MemoryBackoff(ServedSession.__new__(ServedSession))
    (result,) = backoff.run(Batch(items=[item(1)]))
    assert result.error == "Refused: engine=diffusers does not draw from pictures"


def test_a_model_that_is_ready_is_warm_for_pictures_too(monkeypatch):
    config = session_config(NativeEngine(device=Device.cpu), Resident(), warmup=Generate())
    one_step = SMALL.overridden({"num_inference_steps": 1})
    session = ServedSession(config, [WarmupShape(params=one_step)])
    session.start()
    try:
        labels = [told["label"] for told in session.report()["warmup_passes"]]
        assert labels == ["64x64 #1", "64x64 image #1"]
        monkeypatch.setattr(type(session.engine), "encode_picture", Engine.encode_picture)  # as weights without one
        session.extend([WarmupShape(params=one_step, batch_size=2)], ())
        assert [told["label"] for told in session.report()["warmup_passes"]] == ["64x64 b2 #1"]
    finally:
        session.close()


def test_what_a_killed_service_left_is_removed(serve):
    (UPLOADS / "old").mkdir(parents=True)
    (UPLOADS / "old" / "image").write_bytes(CAT)
    serve()
    assert list(UPLOADS.iterdir()) == []


REFUSED: list[tuple[dict[str, Any], Any, int, str, str | None]] = [
    ({}, {"prompt": (None, "a cat")}, 400, "image: send the picture to start from, or a control_image", "image"),
    (FINE, {"mask": ("m.png", half_transparent())}, 400, "image: send the picture to start from", "image"),
    ({**FINE, "image": "/etc/passwd"}, image(), 400, "image: sent more than once: one is taken", "image"),
    (FINE, [("image[]", ("a.png", CAT)), ("image[]", ("b.png", CAT))], 400, "image: sent more than once", "image"),
    ({**FINE, "mask": "http://x/y.png"}, image(), 400, "mask: send the picture itself as a file: no name", "mask"),
    (FINE, {**image(), "markup": ("m.png", CAT)}, 400, "markup: files here are image, mask, control_image", "markup"),
    (FINE, {"control_image": ("e.png", CAT)}, 400, "control_image needs a ControlNet to follow it", None),
    ({**FINE, "control_image": "/etc/passwd"}, image(), 400, "control_image: send the picture itself", "control_image"),
    ({**FINE, "mask_blur": "9"}, image(), 400, "mask_blur=9 says nothing without a mask: add mask=FILE", "mask_blur"),
    ({**FINE, "mask_blur": "0.5"}, image(), 400, "mask_blur: Input should be a valid integer", "mask_blur"),
    ({**FINE, "fit": "cover"}, image(), 400, "fit: Input should be 'crop', 'pad' or 'stretch'", "fit"),
    ({**FINE, "outpaint": "1,2"}, image(), 400, "outpaint='1,2': write", "outpaint"),
    ({**FINE, "outpaint": "4096"}, image(), 413, "outpaint makes the picture 8240x8224 pixels", "outpaint"),
    ({**FINE, "outpaint": "1200", "mask_crop": "8"}, image(), 413, "size=2448x2432: ask for at most 4.2", "size"),
    ({**FINE, "scale": "2", "size": "64x64"}, image(), 400, "scale=2 says nothing beside width: keep one", "scale"),
    ({**FINE, "scale": "1e9"}, image(), 400, "scale=1000000000.0 is out of range", "scale"),
    ({**FINE, "tile": "16"}, image(), 400, "tile: no such field", "tile"),
    ({}, image(), 400, "prompt: Field required", "prompt"),
    ({**FINE, "path": "x"}, image(), 400, "path: no such field; fields here: image, mask, control", "path"),
    ({**FINE, "n": "two"}, image(), 400, "n: Input should be a valid integer", "n"),
    ({**FINE, "strength": "weak"}, image(), 400, "strength: Input should be a valid number", "strength"),
    ({**FINE, "strength": "1.5"}, image(), 400, "strength=1.5 is out of range: use a number", "strength"),
    ({**FINE, "strength": "nan"}, image(), 400, "strength=nan is not a number", "strength"),
    ({**FINE, "guidance_scale": "inf"}, image(), 400, "guidance_scale=inf is not a number", "guidance_scale"),
    ({**FINE, "size": "4096x4096"}, image(), 413, "ask for at most 4.2 million pixels", "size"),
    ({**FINE, "num_inference_steps": "5000"}, image(), 413, "ask for at most 100", "num_inference_steps"),
    (FINE, image(b"GIF89a"), 400, "image cannot be read as a PNG, JPEG, WebP", "image"),
    (FINE, image(CAT[:100]), 400, "image cannot be read as a PNG, JPEG, WebP", None),
    (FINE, image(encoded(Image.new("CMYK", (32, 32)), "JPEG")), 400, "image is in printing colours (CMYK)", "image"),
    (FINE, image(encoded(Image.new("1", (2000, 600)))), 413, "image has 2000x600 pixels: send at most 1 m", "image"),
    (FINE, {**image(), "mask": ("m.png", CAT)}, 400, "mask is transparent nowhere, so nothing would be", "mask"),
    (FINE, {**image(), "mask": ("m", half_transparent((32, 48)))}, 400, "mask has 32x48 pixels and image 48x32", None),
]  # fmt: skip


def test_what_cannot_be_edited_is_refused_and_leaves_no_file(serve):
    client = serve(max_upload_megapixels=1.0)
    for fields, files, status, text, param in REFUSED:
        answer = client.post(ROUTE, data=fields, files=files)
        error = answer.json()["error"]
        assert (answer.status_code, text in error["message"]) == (status, True), (fields, error)
        assert error["param"] == param, error
        assert "uploads" not in error["message"], "the service's own paths are nobody's business"
    assert list(UPLOADS.iterdir()) == []
    assert GatedSession.batches == []


def test_a_body_that_is_no_form_is_refused(serve):
    client = serve(max_body_mb=0.01)
    part = b'--x\r\ncontent-disposition: form-data; name="prompt"\r\n\r\n%s\r\n'
    cases = [
        (b"{}", "application/json", 415, "send a form: content-type: multipart/form-data"),
        (part % b"a" + b"--x--", "multipart/form-data", 400, "the body is no form: No boundary given"),
        (b"prompt", "multipart/form-data; boundary=x", 400, "the body is no form"),
        (part % b"a", "multipart/form-data; boundary=x", 400, "the body is no form: it ends early"),
        (part % b"a" * 65 + b"--x--", "multipart/form-data; boundary=x", 400, "it has more than 64 parts"),
        (part % "é".encode("latin-1") + b"--x--", "multipart/form-data; boundary=x", 400, "texts are not UTF-8"),
        (part % b"a" * 300, "multipart/form-data; boundary=x", 413, "send at most 0.01 million bytes"),
    ]
    for content, kind, status, text in cases:
        answer = client.post(ROUTE, content=content, headers={"content-type": kind})
        assert (answer.status_code, text in answer.json()["error"]["message"]) == (status, True), answer.text
