"""Pictures over HTTP: OpenAI's form, its limits and its errors."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import os
import signal
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.support.faulty_session import picture
from tests.support.gated_session import GatedSession
from tests.support.serving import LOCAL, body, pixels_of, served
from zimage_runner.executors.child import Child
from zimage_runner.outputs.metadata import read_metadata

ROUTE = "/v1/images/generations"


def test_pictures_come_with_their_seed_and_record(serve):
    client = serve()
    answer = client.post(ROUTE, json=body(n=2, seed=7, num_inference_steps=3)).json()
    assert "data" in answer, answer
    assert [entry["seed"] for entry in answer["data"]] == [7, 8]
    assert (answer["size"], answer["output_format"]) == ("32x32", "png")
    assert answer["queue_seconds"] >= 0
    for entry in answer["data"]:
        data = base64.b64decode(entry["b64_json"])
        assert np.array_equal(pixels_of(data), picture("a cat", entry["seed"], 32, 32))
        recipe = read_metadata(io.BytesIO(data)).recipe
        assert recipe is not None
        assert (recipe["prompt"], recipe["seed"], recipe["params"]["num_inference_steps"]) == (
            "a cat",
            entry["seed"],
            3,
        )


def test_a_url_is_kept_and_a_seed_is_drawn(serve):
    client = serve()
    fields = body(response_format="url", output_format="webp", output_compression=80)
    del fields["seed"]
    (one,), (other,) = (client.post(ROUTE, json=fields).json()["data"] for _ in range(2))
    assert one["seed"] != other["seed"]
    assert one["url"].startswith(LOCAL)
    found = client.get(one["url"])
    assert found.headers["content-type"] == "image/webp"
    assert Image.open(io.BytesIO(found.content)).format == "WEBP"
    assert client.get("/v1/images/files/nothing.png").status_code == 404


REFUSED: list[tuple[dict[str, Any], int, str, str | None]] = [
    ({"prompt": ""}, 400, "the prompt is empty", None),
    ({}, 400, "prompt: Field required", "prompt"),
    ({"prompt": "a", "path": "/etc/passwd"}, 400, "path: no such field", "path"),
    ({"prompt": "a", "image": "cat.png"}, 400, "image: no request names a file", "image"),
    ({"prompt": "a", "n": 0}, 400, "ask for 1 to 10 pictures", "n"),
    ({"prompt": "a", "n": 11}, 413, "ask for 1 to 10 pictures", "n"),
    ({"prompt": "a", "n": True}, 400, "n: Input should be a valid integer", "n"),
    ({"prompt": "a", "size": "100x100"}, 400, "height=100 is not a positive multiple of 16", "size"),
    ({"prompt": "a", "size": "big"}, 400, "size='big': write a size as WIDTHxHEIGHT", "size"),
    ({"prompt": "a", "size": "4096x4096"}, 413, "ask for at most 4.2 million pixels", "size"),
    ({"prompt": "a", "size": "8192x16"}, 413, "width=8192: ask for at most 4096 pixels", "size"),
    ({"prompt": "a", "size": "100000x16"}, 413, "width=100000: ask for at most 4096 pixels", "size"),
    ({"prompt": "a", "num_inference_steps": 500}, 413, "ask for at most 100", "num_inference_steps"),
    ({"prompt": "a", "num_inference_steps": 5000}, 413, "ask for at most 100", "num_inference_steps"),
    ({"prompt": "a", "num_inference_steps": 0}, 400, "use 1 to 1000", "num_inference_steps"),
    ({"prompt": "a", "guidance_scale": -1}, 400, "guidance_scale=-1.0 is out of range", "guidance_scale"),
    ({"prompt": "a", "negative_prompt": "b"}, 400, "has no effect with guidance_scale=0", "negative_prompt"),
    ({"prompt": "a", "seed": -1}, 400, "seed=-1 is out of range", "seed"),
    ({"prompt": "a", "seed": 2**63 - 1, "n": 2}, 400, "is out of range: use 0 to 9223372036854775806", "seed"),
    ({"prompt": "a", "model": "dall-e-3"}, 404, "this service draws with", "model"),
    ({"prompt": "a", "stream": True}, 400, "pictures are not sent in parts", "stream"),
    ({"prompt": "a", "quality": "hd"}, 400, "quality: Input should be", "quality"),
    ({"prompt": "a", "output_compression": 50}, 400, "has no effect on PNG", "output_compression"),
    ({"prompt": "a" * 20_001}, 413, "prompt has 20,001 characters", "prompt"),
    ({"prompt": "a", "negative_prompt": "b" * 40_000}, 413, "has 40,000 characters", "negative_prompt"),
]


def test_what_cannot_be_drawn_is_refused_in_openais_form(serve):
    client = serve()
    for fields, status, text, param in REFUSED:
        answer = client.post(ROUTE, json=fields)
        error = answer.json()["error"]
        assert answer.status_code == status, (fields, error)
        assert text in error["message"], (fields, error)
        assert (error["type"], error["param"]) == ("invalid_request_error", param)
    assert GatedSession.batches == []


def test_a_body_that_is_none_is_refused(serve):
    client = serve(max_body_mb=0.01)
    like_json = {"content-type": "application/json"}
    cases = [
        (b"{", like_json, 400, "the body is no JSON"),
        (b"[1]", like_json, 400, "the body is no JSON object"),
        (b'{"prompt": NaN}', like_json, 400, "NaN is not JSON"),
        (b'{"prompt": "\\ud800"}', like_json, 400, "half of a surrogate pair"),
        (b"[" * 9_000, like_json, 400, "the body is no JSON"),
        (b" " * 10_001, like_json, 413, "send at most 0.01 million bytes"),
        (b"{}", {"content-type": "text/plain"}, 415, "application/json"),
    ]
    for content, headers, status, text in cases:
        answer = client.post(ROUTE, content=content, headers=headers)
        assert (answer.status_code, text in answer.json()["error"]["message"]) == (status, True), answer.text
    in_parts = client.post(ROUTE, content=iter([b" " * 6_000] * 2), headers=like_json)
    assert in_parts.status_code == 413


def test_other_routes(serve):
    client = serve()
    assert client.get("/v1/models").json()["data"][0]["id"] == "zimage_nano"
    assert client.get("/v1/models/zimage_nano").json()["object"] == "model"
    assert client.get("/v1/models/other").status_code == 404
    for said in ({"files": {"image": b""}}, {"json": {}}, {}):
        variations = client.post("/v1/images/variations", **said)
        assert (variations.status_code, variations.json()["error"]["code"]) == (501, "not_implemented")
    assert client.get("/nothing").json()["error"]["message"] == "GET /nothing: Not Found"
    assert client.get("/live").json() == {"live": True}
    assert client.get("/ready").status_code == 200


def test_nothing_is_drawn_before_the_model_is_warm():
    with served(starts=False) as client:
        assert client.get("/live").status_code == 200
        for answer in (client.get("/ready"), client.post(ROUTE, json=body())):
            assert (answer.status_code, answer.headers["retry-after"]) == (503, "5")
            assert answer.json()["error"]["message"] == "the model is being loaded"


def _in_background(client: Any, pool: ThreadPoolExecutor, *bodies: dict[str, Any]) -> list[Any]:
    return [pool.submit(client.post, ROUTE, json=fields) for fields in bodies]


def _until(condition: Any) -> None:
    waited = threading.Event()
    for _ in range(6000):
        if condition():
            return
        waited.wait(0.01)
    raise AssertionError("it did not come to pass within a minute")


def test_a_full_queue_is_told_and_has_room_again(serve, monkeypatch):
    monkeypatch.setattr(GatedSession, "gate", threading.Semaphore(0))
    client = serve(queue=2, max_images=2)
    scheduler = client.service.scheduler
    with ThreadPoolExecutor(2) as pool:
        first = _in_background(client, pool, body(seed=1))
        assert GatedSession.waits.wait(60)
        second = _in_background(client, pool, body(seed=2, n=2))
        _until(lambda: scheduler.waiting == 2)
        refused = client.post(ROUTE, json=body(seed=9))
        assert (refused.status_code, refused.json()["error"]["code"]) == (429, "queue_full")
        assert int(refused.headers["retry-after"]) >= 1
        assert GatedSession.gate is not None
        GatedSession.gate.release(100)
        assert [future.result().status_code for future in [*first, *second]] == [200, 200]
        assert client.post(ROUTE, json=body(seed=9)).status_code == 200


def test_a_client_that_goes_away_frees_its_place(serve, monkeypatch):
    monkeypatch.setattr(GatedSession, "gate", threading.Semaphore(0))
    client = serve()
    scheduler = client.service.scheduler
    with ThreadPoolExecutor(1) as pool:
        (first,) = _in_background(client, pool, body("first"))
        assert GatedSession.waits.wait(60)
        assert asyncio.run(_ask_and_leave(client.app, body("left"), lambda: scheduler.waiting == 1)) == 499
        assert scheduler.waiting == 0
        assert GatedSession.gate is not None
        GatedSession.gate.release(100)
        assert first.result().status_code == 200
        assert client.post(ROUTE, json=body("last")).status_code == 200
    assert [text for batch in GatedSession.batches for text, _ in batch] == ["first", "last"]


async def _ask_and_leave(app: Any, fields: dict[str, Any], queued: Any) -> int:
    """Ask, and close the connection once the request is queued. Return the status that nobody reads."""
    parts = [{"type": "http.request", "body": json.dumps(fields).encode(), "more_body": False}]
    sent: list[dict[str, Any]] = []

    async def receive() -> dict[str, Any]:
        if parts:
            return parts.pop(0)
        while not queued():
            await asyncio.sleep(0.01)
        return {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        sent.append(message)

    headers = [(b"host", b"127.0.0.1:8189"), (b"content-type", b"application/json")]
    scope = {
        "type": "http", "method": "POST", "path": ROUTE, "raw_path": ROUTE.encode(), "query_string": b"",
        "headers": headers, "scheme": "http", "server": ("127.0.0.1", 8189), "http_version": "1.1", "root_path": "",
    }  # fmt: skip
    await app(scope, receive, send)
    return sent[0]["status"]


def test_a_request_that_takes_too_long_is_answered_and_frees_its_place(serve, monkeypatch):
    monkeypatch.setattr(GatedSession, "gate", threading.Semaphore(0))
    client = serve(request_timeout_s=0.2)
    late = client.post(ROUTE, json=body(n=3))
    assert (late.status_code, late.json()["error"]["code"]) == (504, "timeout")
    assert client.service.scheduler.waiting == 0
    assert GatedSession.gate is not None
    GatedSession.gate.release(100)
    assert GatedSession.batches == [[("a cat", 1)]]


def test_equal_shapes_of_several_requests_are_one_batch(serve, monkeypatch):
    monkeypatch.setattr(GatedSession, "gate", threading.Semaphore(0))
    client = serve(batch_size=4)
    with ThreadPoolExecutor(5) as pool:
        (first,) = _in_background(client, pool, body("first"))
        assert GatedSession.waits.wait(60)
        rest = _in_background(
            client,
            pool,
            body("b"),
            body("c", seed=5),
            body("large", size="64x64"),
            body("steps", num_inference_steps=2),
        )
        _until(lambda: client.service.scheduler.waiting == 4)
        assert GatedSession.gate is not None
        GatedSession.gate.release(100)
        answers = [future.result() for future in [first, *rest]]
    assert [answer.status_code for answer in answers] == [200] * 5
    for answer, (text, seed) in zip(answers[:3], [("first", 1), ("b", 1), ("c", 5)], strict=True):
        data = base64.b64decode(answer.json()["data"][0]["b64_json"])
        assert np.array_equal(pixels_of(data), picture(text, seed, 32, 32))
    sizes = sorted(sorted(text for text, _ in batch) for batch in GatedSession.batches)
    assert sizes == [["b", "c"], ["first"], ["large"], ["steps"]]


def test_a_model_that_is_lost_costs_a_picture_one_more_attempt(serve, monkeypatch):
    monkeypatch.setenv("FAULTS", json.dumps([{"on": 5, "kind": "lost", "times": 1}]))
    monkeypatch.setattr("zimage_runner.serve.scheduler.FIRST_PAUSE_S", 0.01)
    client = serve()
    answer = client.post(ROUTE, json=body(seed=5))
    assert answer.status_code == 200
    assert GatedSession.batches == [[("a cat", 5)], [("a cat", 5)]]
    assert "zimage_model_restarts_total 1\n" in client.get("/metrics").text


def test_a_picture_that_takes_every_model_with_it_is_given_up(serve, monkeypatch):
    monkeypatch.setenv("FAULTS", json.dumps([{"on": 5, "kind": "lost"}]))
    monkeypatch.setattr("zimage_runner.serve.scheduler.FIRST_PAUSE_S", 0.01)
    client = serve()
    answer = client.post(ROUTE, json=body(seed=5))
    assert answer.status_code == 503
    assert "the model was lost while this was drawn" in answer.json()["error"]["message"]
    _until(client.service.scheduler.ready.is_set)
    assert client.post(ROUTE, json=body(seed=6)).status_code == 200


@pytest.mark.parametrize(
    ("fault", "status", "text"),
    [
        ({"kind": "black", "good_attempt": 2}, 200, ""),
        ({"kind": "nan"}, 500, "the picture came out bad 2 times"),
        ({"kind": "raise"}, 500, "this item cannot be drawn"),
    ],
)
def test_a_picture_that_comes_out_bad_is_drawn_once_more(serve, monkeypatch, fault, status, text):
    monkeypatch.setenv("FAULTS", json.dumps([{"on": 5, **fault}]))
    client = serve()
    answer = client.post(ROUTE, json=body(seed=5))
    assert answer.status_code == status
    assert text in answer.text
    assert client.post(ROUTE, json=body(seed=6)).status_code == 200


def test_a_worker_that_dies_loses_no_request(monkeypatch):
    monkeypatch.setenv("FAULTS", json.dumps([{"on": 5, "kind": "kill", "times": 1}]))
    with served("process") as client:
        answer = client.post(ROUTE, json=body(seed=5))
        assert answer.status_code == 200
        text = client.get("/metrics").text
    assert "zimage_worker_restarts_total 1\n" in text
    assert "zimage_pictures_total 1\n" in text


def test_a_worker_that_dies_idle_is_replaced_before_it_is_needed(monkeypatch):
    workers: list[Child] = []
    start = Child.start
    monkeypatch.setattr(Child, "start", lambda child, *given: workers.append(child) or start(child, *given))
    with served("process") as client:
        os.kill(workers[0].pid, signal.SIGKILL)
        _until(lambda: client.get("/ready").status_code == 503)
        _until(lambda: client.get("/ready").status_code == 200)
        assert "zimage_worker_restarts_total 1\n" in client.get("/metrics").text
        assert client.post(ROUTE, json=body()).status_code == 200


def test_what_is_counted(serve):
    client = serve()
    client.post(ROUTE, json=body(n=2))
    client.post(ROUTE, json={})
    text = client.get("/metrics").text
    for line in (
        'zimage_requests_total{route="/v1/images/generations",status="200"} 1',
        'zimage_requests_total{route="/v1/images/generations",status="400"} 1',
        'zimage_request_seconds_bucket{le="+Inf"} 1',
        "zimage_pictures_total 2",
        "zimage_queue_pictures 0",
        "zimage_ready 1",
        "zimage_gpu_memory_reserved_bytes 0",
    ):
        assert f"{line}\n" in text, line


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_workers_killed_again_and_again_under_load_lose_no_request(monkeypatch):
    """Every fourth picture takes its worker with it, once."""
    killers = range(0, 200, 4)
    monkeypatch.setenv("FAULTS", json.dumps([{"on": seed, "kind": "kill", "times": 1} for seed in killers]))
    with served("process", queue=100) as client, ThreadPoolExecutor(8) as pool:
        run = client.post(
            "/v1/runs", json={"prompts": ["of the run"], "seeds": "1000-1039", "sampling": {"height": 32, "width": 32}}
        )
        assert run.status_code == 202
        answers = list(pool.map(lambda seed: client.post(ROUTE, json=body(seed=seed)), range(200)))
        assert [answer.status_code for answer in answers] == [200] * 200
        for seed, answer in enumerate(answers):
            data = base64.b64decode(answer.json()["data"][0]["b64_json"])
            assert np.array_equal(pixels_of(data), picture("a cat", seed, 32, 32))
        _until(lambda: client.get(f"/v1/runs/{run.json()['id']}").json()["state"] == "done")
        text = client.get("/metrics").text
    assert f"zimage_worker_restarts_total {len(killers)}\n" in text
    assert "zimage_pictures_total 240\n" in text, "each exactly once"
