"""The service as a process: the openai client, a clean end, and a start after kill -9. With the embedded model."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import zimage_runner as zr
from tests.support.serving import pixels_of

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
        with pytest.raises(openai.BadRequestError, match="zimage_nano can only draw 128x128 pictures"):
            client.images.generate(prompt="a cat", size="1024x1024")
        with pytest.raises(openai.AuthenticationError):
            openai.OpenAI(base_url=client.base_url, api_key="wrong", max_retries=0).models.list()
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
    (saved,) = Path("outputs", ".serve").glob("*.json")
    assert json.loads(saved.read_text())["state"] == "queued", "the next service goes on with it"


@pytest.mark.slow
def test_the_next_service_goes_on_after_kill_9():
    with started() as (process, port):
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
