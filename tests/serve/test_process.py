"""The service as a process: the openai client, a clean end, kills -9, what its page says. With the embedded model."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageChops

import zimage_runner as zr
from benchmarks.serve_kills import Campaign
from tests.support.serving import pixels_of
from zimage_runner.reproduce import main as reproduce

TOKEN = "0123456789abcdef"
SMALL = {"num_inference_steps": 1}


@contextlib.contextmanager
def started(*words: str) -> Iterator[tuple[subprocess.Popen[str], int]]:
    """A service that is ready, and its port."""
    Path("token").write_text(TOKEN, encoding="utf-8")
    argv = ["model=zimage_nano", "warmup=hardware", "server.port=0", "server.token_file=token", *words]
    process = subprocess.Popen(
        [sys.executable, "-m", "zimage_runner", "serve", *argv],
        stdout=subprocess.PIPE, stderr=sys.stderr, encoding="utf-8", process_group=0,
    )  # fmt: skip
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        assert line.startswith("http://127.0.0.1:"), line
        port = int(line.rpartition(":")[2])
        _until(lambda: ask(port, "GET", "/ready")[0] == 200)
        yield process, port
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def ask(port: int, method: str, route: str, body: Any = None) -> tuple[int, Any]:
    """Status and JSON of an answer."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=120)
    headers = {"authorization": f"Bearer {TOKEN}", "content-type": "application/json"}
    connection.request(method, route, None if body is None else json.dumps(body), headers)
    answer = connection.getresponse()
    return answer.status, json.loads(answer.read())


def _until(condition: Callable[[], Any]) -> None:
    end = time.monotonic() + 240
    while not condition():
        assert time.monotonic() < end, "it did not come to pass"
        time.sleep(0.05)


def test_the_openai_client_and_a_clean_end():
    openai = pytest.importorskip("openai")
    with started("executor=inline") as (process, port):
        client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key=TOKEN, max_retries=0)
        assert [model.id for model in client.models.list()] == ["zimage_nano"]
        drawn = client.images.generate(
            prompt="a cat", model="zimage_nano", n=2, size="128x128", response_format="b64_json",
            extra_body={"seed": 3, **SMALL},
        )  # fmt: skip
        size = (128, 128)
        Image.linear_gradient("L").convert("RGB").resize(size).save("cat.png")
        mask, alpha = Image.new("L", size), Image.new("RGBA", size, "black")
        mask.paste(255, (64, 0, *size))
        mask.save("mask.png")
        alpha.putalpha(ImageChops.invert(mask))
        alpha.save("alpha.png")
        edited = client.images.edit(
            image=Path("cat.png"), mask=Path("alpha.png"), prompt="a hat", n=1,
            extra_body={"seed": 3, "strength": 0.8, "num_inference_steps": 2},
        )  # fmt: skip
        with pytest.raises(openai.BadRequestError, match="image: sent more than once"):
            client.images.edit(image=[Path("cat.png"), Path("mask.png")], prompt="a hat")
        with pytest.raises(openai.BadRequestError, match="zimage_nano can only draw 128x128 pictures"):
            client.images.generate(prompt="a cat", size="1024x1024")
        with pytest.raises(openai.AuthenticationError):
            openai.OpenAI(base_url=client.base_url, api_key="wrong", max_retries=0).models.list()
        if shutil.which("curl"):
            check_curl_lines(port)
        status, run = ask(port, "POST", "/v1/runs", {"prompts": ["a dog"], "seeds": "0-999", "sampling": SMALL})
        assert status == 202
        _until(lambda: ask(port, "GET", f"/v1/runs/{run['id']}")[1]["counts"]["ok"] >= 1)
        process.send_signal(signal.SIGTERM)
        assert process.wait(120) == 0
    import base64

    done = zr.run(model="zimage_nano", prompt="a cat", seeds=[3, 4], sampling=SMALL)
    for picture, item in zip(drawn.data or [], done.items, strict=True):
        assert item.image is not None
        assert np.array_equal(pixels_of(base64.b64decode(picture.b64_json)), pixels_of(item.image.read_bytes()))
    inputs = {"image": "cat.png", "mask": "mask.png", "strength": 0.8, "num_inference_steps": 2}
    (item,) = zr.run(model="zimage_nano", prompt="a hat", seeds=[3], sampling=inputs).items
    assert item.image is not None
    data = base64.b64decode((edited.data or [])[0].b64_json)
    assert np.array_equal(pixels_of(data), pixels_of(item.image.read_bytes()))
    Path("edited.png").write_bytes(data)
    assert reproduce(["edited.png", "sampling.mask=mask.png"]) == 0, "cat.png is found by its name and digest"
    states = {path.stem: json.loads(path.read_text())["state"] for path in Path("outputs", ".serve").glob("*.json")}
    assert [state for name, state in states.items() if run["id"] in name] == ["queued"], "the next one goes on with it"


@pytest.mark.slow
def test_the_next_service_goes_on_after_kill_9():
    with started() as (process, port):
        loaded = Path(f"/proc/{process.pid}/maps").read_text(encoding="utf-8")
        assert all(library in loaded for library in ("_multiarray_umath", "PIL/_imaging")), "the first request waits"
        _, run = ask(port, "POST", "/v1/runs", {"prompts": ["a dog"], "seeds": "0-9", "sampling": SMALL})
        _until(lambda: ask(port, "GET", f"/v1/runs/{run['id']}")[1]["counts"]["ok"] >= 2)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    with started() as (_, port):
        _until(lambda: ask(port, "GET", f"/v1/runs/{run['id']}")[1]["state"] == "done")
        assert ask(port, "GET", f"/v1/runs/{run['id']}")[1]["counts"]["ok"] == 10
    lines = [
        json.loads(line)
        for line in Path("outputs", run["directory"], "records.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    assert sorted(line["seed"] for line in lines) == list(range(10)), "each picture exactly once"


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_the_service_and_its_worker_are_killed_again_and_again_under_load(tmp_path):
    """Each accepted run is drawn once, and each request is answered, refused, or loses its service."""
    result = Campaign(tmp_path, clients=4, seed=20).run(worker_kills=12, service_kills=5)
    assert result["wrong"] == []
    assert result["requests"]["200"] > 0
    assert result["runs"]["accepted"] == 5


def curl_lines() -> list[list[str]]:
    """The curl commands of docs/serve.md that need no other machine."""
    page = (Path(__file__).parents[2] / "docs" / "serve.md").read_text(encoding="utf-8")
    text = "\n".join(re.findall(r"```bash\n(.*?)```", page, re.S)).replace("\\\n", " ")
    lines = [line for line in text.splitlines() if line.startswith("curl") and "127.0.0.1" in line]
    return [shlex.split(line, comments=True) for line in lines]


def check_curl_lines(port: int) -> None:
    """Each is answered as the page says."""
    lines = curl_lines()
    assert len(lines) == 4
    for words in lines:
        here = [word.replace("127.0.0.1:8189", f"127.0.0.1:{port}") for word in words]
        argv = [*here, "-sS", "-f", "-H", f"authorization: Bearer {TOKEN}"]
        done = subprocess.run(argv, capture_output=True, timeout=240, check=False)
        assert done.returncode == 0, (words, done.stdout, done.stderr)
        answer = json.loads(done.stdout)
        if "images" in words[1]:
            assert [picture["seed"] for picture in answer["data"]] == [7, 8][: 1 + ("generations" in words[1])]
        elif "runs" in words[1]:
            assert answer["counts"]["planned"] == 11
            assert ask(port, "DELETE", f"/v1/runs/{answer['id']}")[0] in (200, 202)
