"""Runs over HTTP: ordinary runs on disk, between the pictures of requests."""

from __future__ import annotations

import itertools
import json
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

import zimage_runner as zr
from tests.support.faulty_session import picture
from tests.support.gated_session import GatedSession
from tests.support.serving import body, pixels_of, served, settings
from zimage_runner.errors import UserError
from zimage_runner.serve.run_files import FOLDER
from zimage_runner.serve.runs import RunQueue
from zimage_runner.serve.scheduler import Scheduler

ROUTE = "/v1/runs"
SMALL = {"height": 32, "width": 32, "num_inference_steps": 2}


def begin(client: Any, *prompts: Any, **fields: Any) -> dict[str, Any]:
    answer = client.post(ROUTE, json={"prompts": list(prompts), "sampling": SMALL, **fields})
    assert answer.status_code == 202, answer.text
    assert answer.headers["location"] == f"{ROUTE}/{answer.json()['id']}"
    return answer.json()


def ended(client: Any, run: dict[str, Any], state: str = "done") -> dict[str, Any]:
    """The run once it is in this state."""
    for _ in range(6000):
        now = client.get(f"{ROUTE}/{run['id']}").json()
        if now["state"] == state:
            return now
        assert now["state"] in ("queued", "running"), now
        time.sleep(0.01)
    raise AssertionError(now)


def test_a_run_is_one_on_disk(serve):
    client = serve()
    run = begin(client, "a cat", {"text": "a dog", "id": "dog", "seeds": [9], "height": 64, "width": 64}, seeds="1-2")
    done = ended(client, run)
    assert done["counts"] == {"planned": 3, "ok": 3, "failed": 0, "remaining": 0}
    listed = client.get(f"{ROUTE}/{run['id']}/pictures").json()
    assert listed["total"] == 3
    assert {entry["item"]: entry["status"] for entry in listed["data"]} == {
        "items/00000_a_cat/seed_1": "ok", "items/00000_a_cat/seed_2": "ok", "items/00001_dog/seed_9": "ok",
    }  # fmt: skip
    by_item = {entry["item"]: client.get(entry["url"]).content for entry in listed["data"]}
    assert np.array_equal(pixels_of(by_item["items/00001_dog/seed_9"]), picture("a dog", 9, 64, 64))
    directory = Path("outputs", run["directory"])
    for item, data in by_item.items():
        assert (directory / item / "image.png").read_bytes() == data
    assert json.loads((directory / "summary.json").read_text())["status"] == "complete"
    assert client.get(f"{ROUTE}/{run['id']}/pictures/3").status_code == 404
    assert client.get(f"{ROUTE}/{run['id']}/pictures/..%2Frecords.jsonl").status_code == 404
    assert client.get(ROUTE).json()["data"][0]["id"] == run["id"]
    assert client.get(f"{ROUTE}/run-none").json()["error"]["code"] == "not_found"


REFUSED: list[tuple[dict[str, Any], int, str]] = [
    ({}, 400, "prompts: Field required"),
    ({"prompts": []}, 400, "prompts is empty"),
    ({"prompts": ["a"], "path": "/etc/passwd"}, 400, "path: no such field"),
    ({"prompts": ["a"], "output": {"root": "/tmp"}}, 400, "output: no such field"),
    ({"prompts": [{"text": "a", "image": "/etc/passwd"}]}, 400, "prompts[0]: 'image': no request names a file"),
    ({"prompts": ["a"], "sampling": {"control_image": "x"}}, 400, "sampling.control_image: no request names a file"),
    ({"prompts": ["a"], "sampling": {"strength": 0.5}}, 400, "sampling.strength: no such field"),
    ({"prompts": [{"text": "a", "source": "x"}]}, 400, "'source': no such field"),
    ({"prompts": ["a"], "name": "../up"}, 400, "is not a folder name"),
    ({"prompts": ["a"], "name": "${oc.env:HOME}"}, 400, "is not a folder name"),
    ({"prompts": ["a"], "sampling": {"hight": 64}}, 400, "sampling.hight: no such field"),
    ({"prompts": ["a"], "sampling": {"height": "x"}}, 400, "height='x' is not an integer"),
    ({"prompts": ["a"], "sampling": {"height": 4096, "width": 4096}}, 413, "at most 4.2 million pixels"),
    ({"prompts": ["a"], "sampling": {"height": 8192}}, 413, "height=8192: ask for at most 4096 pixels"),
    ({"prompts": ["a"], "sampling": {"num_inference_steps": 5000}}, 413, "ask for at most 100"),
    ({"prompts": [{"text": "a", "num_inference_steps": "5000"}]}, 413, "ask for at most 100"),
    ({"prompts": ["a" * 40_000]}, 413, "prompt has 40,000 characters"),
    ({"prompts": [{"text": "a" * 40_000}]}, 413, "text has 40,000 characters"),
    ({"prompts": ["a"], "seeds": "5-1"}, 400, "runs backwards"),
    ({"prompts": ["a"], "seeds": "0-9999999"}, 413, "seeds names 10,000,000 seeds: use at most 1,000,000"),
    ({"prompts": ["a"], "seeds": {"count": 10_000_000}}, 413, "seeds names 10,000,000 seeds: use at most 1,000,000"),
    ({"prompts": ["a"], "seeds": "0-99"}, 413, "more than 50 pictures"),
    ({"prompts": [{"text": "a", "seeds": "0-99"}]}, 413, "more than 50 pictures"),
]


def test_what_no_run_may_say_is_refused(serve):
    client = serve(max_run_images=50)
    for fields, status, text in REFUSED:
        answer = client.post(ROUTE, json=fields)
        assert answer.status_code == status, (fields, answer.text)
        assert text in answer.json()["error"]["message"], (fields, answer.text)
    assert [path.name for path in Path("outputs").iterdir()] == [FOLDER]


def test_texts_of_a_request_are_never_looked_up(serve, monkeypatch):
    monkeypatch.setenv("SECRET", "told")
    client = serve()
    guided = {**SMALL, "guidance_scale": 2, "negative_prompt": "${oc.env:SECRET} \\${x}"}
    run = begin(client, "${oc.env:SECRET} {a|b} __wild__", sampling=guided)
    ended(client, run)
    (record,) = Path("outputs", run["directory"]).glob("items/*/*/record.json")
    kept = json.loads(record.read_text())
    assert (kept["prompt"], kept["params"]["negative_prompt"]) == (
        "${oc.env:SECRET} {a|b} __wild__", "${oc.env:SECRET} \\${x}",
    )  # fmt: skip


def test_requests_go_between_the_pictures_of_a_run(serve, monkeypatch):
    monkeypatch.setattr(GatedSession, "gate", threading.Semaphore(0))
    client = serve()
    run = begin(client, "of the run", seeds="1-5")
    assert GatedSession.waits.wait(60)
    with ThreadPoolExecutor(2) as pool:
        asked = [pool.submit(client.post, "/v1/images/generations", json=body(t, n=2)) for t in ("first", "second")]
        while client.service.scheduler.waiting < 4:
            time.sleep(0.01)
        assert GatedSession.gate is not None
        GatedSession.gate.release(100)
        assert [future.result().status_code for future in asked] == [200, 200]
    ended(client, run)
    texts = [text for batch in GatedSession.batches for text, _ in batch]
    last = max(place for place, text in enumerate(texts) if text != "of the run")
    pairs = list(itertools.pairwise(texts[: last + 1]))
    assert ("of the run", "of the run") not in pairs, "a request that waits is next after a picture of the run"
    of_requests = [text for text in texts if text != "of the run"]
    assert sorted(of_requests[:2]) == ["first", "second"], "each request's first picture comes before anyone's second"
    assert (len(of_requests), texts.count("of the run")) == (4, 5)


def test_a_run_is_stopped_and_finished_by_the_command_line(serve, monkeypatch):
    monkeypatch.setattr(GatedSession, "gate", threading.Semaphore(0))
    with served(token="0123456789abcdef", max_runs=2) as client:
        client.headers["authorization"] = "Bearer 0123456789abcdef"
        run, waiting = begin(client, "a cat", seeds="1-9", name="mine"), begin(client, "never")
        assert client.post(ROUTE, json={"prompts": ["one more"]}).json()["error"]["code"] == "queue_full"
        assert GatedSession.waits.wait(60)
        assert client.delete(f"{ROUTE}/{waiting['id']}").json()["state"] == "stopped"
        client.delete(f"{ROUTE}/{run['id']}")
        assert GatedSession.gate is not None
        GatedSession.gate.release(100)
        stopped = ended(client, run, "stopped")
        assert 1 <= stopped["counts"]["ok"] <= 2
    directory = Path("outputs", run["directory"])
    assert directory.parent.name == "mine"
    saved = {path.name: path.read_text() for path in (directory / ".hydra").iterdir()}
    assert "0123456789abcdef" not in "".join(saved.values())
    assert "server" not in yaml.safe_load(saved["config.yaml"])
    monkeypatch.setattr("zimage_runner.runner.pool.Session", GatedSession)
    finished = zr.run(f"resume={directory}")
    assert (finished.exit_code, len(finished.items)) == (0, 9)
    assert {item.record()["params"]["num_inference_steps"] for item in finished.items} == {2}


def test_the_next_service_goes_on_with_the_queue(monkeypatch):
    monkeypatch.setattr(GatedSession, "gate", threading.Semaphore(0))
    with served() as client:
        first, second = begin(client, "a cat", seeds="1-6"), begin(client, "a dog")
        assert GatedSession.waits.wait(60)
        with pytest.raises(UserError, match="in use"):
            RunQueue(settings("executor=inline"), _never_started())
    monkeypatch.setattr(GatedSession, "gate", None)
    before = len(GatedSession.batches)
    assert before <= 2
    states = [json.loads(path.read_text())["state"] for path in sorted(Path("outputs", FOLDER).glob("*.json"))]
    assert states == ["queued", "queued"]
    with served() as client:
        assert ended(client, first)["counts"]["ok"] == 6
        assert ended(client, second)["counts"]["ok"] == 1
        assert client.delete(f"{ROUTE}/{first['id']}").json()["state"] == "done"
    assert len(GatedSession.batches) == 7, "nothing is drawn twice"


def test_a_run_whose_service_was_killed_before_it_wrote_anything(serve):
    """Accepted, and perhaps an empty run directory: it is drawn from its first picture."""
    queue = RunQueue(given := settings("executor=inline"), _never_started())
    given.executor()  # finds the model
    from zimage_runner.serve.fields import RunRequest, parse

    run = queue.accept(parse(RunRequest, {"prompts": ["a cat"], "sampling": SMALL}))
    queue.path(run).mkdir(parents=True)
    queue.close()
    Path("outputs", FOLDER, "run-broken.json").write_text("{", encoding="utf-8")
    client = serve()
    assert ended(client, {"id": run.id})["counts"]["ok"] == 1


def _never_started() -> Scheduler:
    return Scheduler(lambda: pytest.fail("not to be started"), most_waiting=1, largest_batch=1, on_overdue=print)


def test_a_run_survives_models_that_are_lost(serve, monkeypatch):
    monkeypatch.setenv("FAULTS", json.dumps([{"on": 3, "kind": "lost", "times": 1}]))
    monkeypatch.setattr("zimage_runner.serve.scheduler.FIRST_PAUSE_S", 0.01)
    client = serve()
    run = begin(client, "a cat", seeds="1-5")
    assert ended(client, run)["counts"]["ok"] == 5


def test_a_run_that_every_model_is_lost_with_is_set_aside(serve, monkeypatch):
    monkeypatch.setenv("FAULTS", json.dumps([{"on": 3, "kind": "lost"}]))
    monkeypatch.setattr("zimage_runner.serve.scheduler.FIRST_PAUSE_S", 0.01)
    client = serve()
    run = begin(client, "a cat", seeds="1-5")
    assert ended(client, run, "stopped")["error"] == "it could not go on"
    assert client.service.scheduler.ready.wait(60)
    assert ended(client, begin(client, "a dog"))["counts"]["ok"] == 1


def test_a_model_in_this_process_that_hangs_ends_it_and_the_next_one_goes_on(monkeypatch):
    left = threading.Event()

    def leave(code: int) -> None:
        assert code == 1
        left.set()

    monkeypatch.setattr(GatedSession, "gate", threading.Semaphore(0))
    with served(item_timeout_s=0.2) as client:
        monkeypatch.setattr("zimage_runner.serve.service.os._exit", leave)
        run = begin(client, "a cat")
        assert left.wait(60)
        (file,) = Path("outputs", FOLDER).glob("run-*.json")
        saved = json.loads(file.read_text())
        assert (saved["id"], saved["state"], saved["troubles"]) == (run["id"], "queued", 1)


def test_a_run_with_a_picture_that_fails_says_so(serve, monkeypatch):
    monkeypatch.setenv("FAULTS", json.dumps([{"on": 3, "kind": "raise"}]))
    client = serve()
    failed = ended(client, begin(client, "a cat", seeds="1-5"), "failed")
    assert failed["counts"] == {"planned": 5, "ok": 4, "failed": 1, "remaining": 0}
    assert "summary.json lists them" in failed["error"]


def test_events_tell_each_change_until_the_end(serve, monkeypatch):
    monkeypatch.setattr("zimage_runner.serve.run_routes.POLL_SECONDS", 0.01)
    client = serve()
    run = begin(client, "a cat", seeds="1-3")
    with client.stream("GET", f"{ROUTE}/{run['id']}/events") as stream:
        assert stream.headers["content-type"].startswith("text/event-stream")
        events = [json.loads(line.removeprefix("data: ")) for line in stream.iter_lines() if line]
    assert events[-1]["state"] == "done"
    assert events[-1]["counts"]["ok"] == 3
    counts = [event["counts"]["ok"] for event in events]
    assert counts == sorted(counts)


def test_no_prompt_reaches_the_terminal_unless_asked(serve, monkeypatch, capfd):
    monkeypatch.setenv("FAULTS", json.dumps([{"on": 3, "kind": "raise"}, {"on": 4, "kind": "black"}]))
    for asked in (False, True):
        client = serve(log_prompts=asked)
        run = begin(client, "private matters", seeds="1-4")
        ended(client, run, "failed")
        client.post("/v1/images/generations", json=body("private matters", seed=3))
        client.__exit__(None, None, None)
        assert client.service.close()
        out, err = capfd.readouterr()
        assert ("private" in out + err) == asked
        assert f"{run['id']}: failed, 2 of 4 pictures in {run['directory']}" in err
        assert "private_matters" in Path("outputs", run["directory"], "run.log").read_text(encoding="utf-8")


def test_a_ledger_is_read_as_it_grows(tmp_path):
    from zimage_runner.outputs.ledger import Ledger, record_head
    from zimage_runner.serve.settled import SettledItems

    def add(ledger: Ledger, seed: int, **result: Any) -> None:
        status = "failed" if "error" in result else "ok"
        ledger.append(record_head(f"items/{seed}", status, 0, seed, "f", **result))

    picture = {"image": "image.png", "sha256": "0" * 64, "bytes": 1}
    found = SettledItems()
    assert found.counts(tmp_path) == (0, 0)
    ledger = Ledger.load(tmp_path / "records.jsonl").open()
    add(ledger, 1, **picture)
    add(ledger, 2, error="no")
    assert found.counts(tmp_path) == (1, 1)
    with ledger.path.open("ab") as file:
        file.write(b'{"item":"items/3","sta')
    assert found.counts(tmp_path) == (1, 1)
    ledger.close()
    ledger = Ledger.load(ledger.path).open()  # cuts the torn line off
    add(ledger, 2, **picture)
    add(ledger, 4, error="no")
    assert found.counts(tmp_path) == (2, 1)
    total, entries = found.items(tmp_path, 1, 5)
    assert (total, [item for item, _ in entries]) == (3, ["items/2", "items/4"])
    ledger.close()
    ledger.path.write_bytes(b"")
    assert found.counts(tmp_path) == (0, 0)


def test_runs_that_have_ended_are_forgotten_in_the_end(serve, monkeypatch):
    monkeypatch.setattr("zimage_runner.serve.run_files.ENDED_KEPT", 2)
    client = serve()
    runs = [begin(client, "a cat", seeds=[seed]) for seed in range(4)]
    ended(client, runs[-1])
    while len(client.service.runs.all()) > 2:  # it is told before the oldest are forgotten
        time.sleep(0.01)
    assert [run["id"] for run in client.get(ROUTE).json()["data"]] == [runs[3]["id"], runs[2]["id"]]
    assert len(list(Path("outputs", FOLDER).glob("run-*.json"))) == 2
