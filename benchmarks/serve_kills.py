"""Kill -9 of the service and of its worker at random instants, under load: what becomes of requests and runs.

    python -m benchmarks.serve_kills [--worker-kills 50] [--service-kills 20] [--clients 4] [--seed N] [--output FILE]

Services follow each other on one output root. In each one clients ask for pictures without a pause, a run is accepted,
the worker is killed a few times (while it loads or draws), and then the service itself. The last service is let
finish. Right is: every run that was accepted has each of its pictures in its ledger once; every request is answered
with a picture or an error, except those whose service was killed; one seed is always one picture. An item that two
kills hit is given up by the rule of ``executor=process``, and counted here.
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import http.client
import io
import json
import os
import random
import signal
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

from benchmarks import machine
from benchmarks.serve import ROUTE, ask, children_of, service

FAST = {"num_inference_steps": 1}
PICTURES = 6
"""Of a run: as many as a service draws before it is killed, and some."""
SEEDS = 12
"""Of requests: few, so that each is drawn often and can be compared."""
BETWEEN = 3
"""Requests at most that are answered between two kills. Before some kills none need be: they hit what is loading."""
INSTANT_S = 1.0
"""The kill comes at any instant of so long a time after that."""
GONE_S, END_S = 60.0, 900.0
"""The longest time until something has ended or begun, and until the last service has drawn all runs."""


def main() -> int:
    parser = argparse.ArgumentParser(description="kills of the service and of its worker, under load")
    parser.add_argument("--worker-kills", type=int, default=50)
    parser.add_argument("--service-kills", type=int, default=20)
    parser.add_argument("--clients", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, help="add the JSON to this file, as its field kills")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        result = Campaign(Path(folder), args.clients, args.seed).run(args.worker_kills, args.service_kills)
    known = json.loads(args.output.read_bytes()) if args.output and args.output.exists() else {}
    machine.report(known | {"kills": result}, args.output)
    return 1 if result["wrong"] else 0


class Campaign:
    """Services on one output root, one after the other, and what was seen."""

    def __init__(self, root: Path, clients: int, seed: int) -> None:
        self._root = root
        self._clients = clients
        self._rng = random.Random(seed)
        self._lock = threading.Lock()
        self._answers: Counter[str] = Counter()
        self._pictures: dict[tuple[str, int], str] = {}
        """Digest of the pixels of each prompt and seed."""
        self._runs: list[dict[str, Any]] = []
        self._wrong: list[str] = []
        self._over = threading.Event()
        """The service is about to be killed: lost connections are its clients' due."""

    def run(self, worker_kills: int, service_kills: int) -> dict[str, Any]:
        """Kill so often, let the last service finish, and return the counts; ``wrong`` is empty if all is right."""
        began = time.monotonic()
        for life in range(service_kills):
            share = worker_kills * (life + 1) // service_kills - worker_kills * life // service_kills
            self._live(share)
        states, given_up = self._finish()
        return {
            "kills": {"service": service_kills, "worker": worker_kills},
            "clients": self._clients,
            "minutes": round((time.monotonic() - began) / 60, 1),
            "requests": dict(sorted(self._answers.items())),
            "runs": {"accepted": len(self._runs), "pictures_each": PICTURES, **states},
            "items_given_up": given_up,
            "wrong": self._wrong,
        }

    def _live(self, worker_kills: int) -> None:
        """One service, from its start to its kill."""
        self._over.clear()
        words = ["model=zimage_nano", "executor.backoff_s=0.1", "server.max_runs=1000"]
        with service(words, str(self._root)) as (port, process):
            self._begin_run(port)
            clients = [threading.Thread(target=self._keep_asking, args=(port,)) for _ in range(self._clients)]
            for client in clients:
                client.start()
            for _ in range(worker_kills):
                worker = self._worker_of(process.pid)
                self._let_some_be_answered()
                if _lives(worker):
                    os.kill(worker, signal.SIGKILL)
                    self._wait("the killed worker is still there", lambda worker=worker: not _lives(worker))
                else:
                    self._wrong.append("a worker ended by itself")
            self._let_some_be_answered()
            if process.poll() is not None:
                self._wrong.append(f"the service ended by itself with {process.returncode}")
            orphans = children_of(process.pid) if process.poll() is None else []
            self._over.set()
            process.kill()
            process.wait()
            for client in clients:
                client.join()
            for orphan in orphans:
                self._wait("a worker outlives its service", lambda orphan=orphan: not _lives(orphan))

    def _let_some_be_answered(self) -> None:
        wanted = self._answers["200"] + self._rng.randrange(BETWEEN + 1)
        self._wait("no request is answered", lambda: self._answers["200"] >= wanted)
        time.sleep(self._rng.uniform(0, INSTANT_S))

    def _begin_run(self, port: int) -> None:
        body = {"prompts": ["a dog"], "seeds": f"0-{PICTURES - 1}", "sampling": FAST}
        status, run, _ = ask(http.client.HTTPConnection("127.0.0.1", port, timeout=60), "POST", "/v1/runs", body)
        if status == 202:
            self._runs.append(run)
        else:
            self._wrong.append(f"a run was answered {status}: {run}")

    def _worker_of(self, pid: int) -> int:
        found: list[int] = []
        self._wait("there is no worker", lambda: found.extend(filter(_lives, children_of(pid))) or bool(found))
        return found[-1] if found else pid

    def _wait(self, what_is_wrong: str, condition: Any) -> None:
        end = time.monotonic() + GONE_S
        while not condition():
            if time.monotonic() > end:
                self._wrong.append(what_is_wrong)
                return
            time.sleep(0.01)

    def _keep_asking(self, port: int) -> None:
        rng = random.Random(threading.get_ident())
        while not self._over.is_set():
            seed = rng.randrange(SEEDS)
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=END_S)
            try:
                status, answer, _ = ask(connection, "POST", ROUTE, {"prompt": "a cat", "seed": seed, **FAST})
            except (OSError, http.client.HTTPException, ValueError) as error:
                lost = self._over.is_set()
                self._count("service killed" if lost else "lost", None if lost else f"a request was lost: {error!r}")
                continue
            finally:
                connection.close()
            if status == 200:
                self._compare("a cat", seed, base64.b64decode(answer["data"][0]["b64_json"]))
                self._count("200")
            elif status in (429, 503) or (status == 500 and "given up: 2 worker" in answer["error"]["message"]):
                self._count("500 given up" if status == 500 else str(status))
                time.sleep(0.05)
            else:
                self._count(str(status), f"a request was answered {status}: {answer}")

    def _count(self, answer: str, wrong: str | None = None) -> None:
        with self._lock:
            self._answers[answer] += 1
            if wrong is not None:
                self._wrong.append(wrong)

    def _compare(self, prompt: str, seed: int, data: bytes) -> None:
        from PIL import Image

        with Image.open(io.BytesIO(data)) as image:
            digest = hashlib.sha256(image.convert("RGB").tobytes()).hexdigest()
        with self._lock:
            if self._pictures.setdefault((prompt, seed), digest) != digest:
                self._wrong.append(f"{prompt!r} with seed {seed} is another picture than before")

    def _finish(self) -> tuple[dict[str, int], int]:
        """Let the last service draw what is left, and look at every run. States, and items that were given up."""
        ended: dict[str, str] = {}

        def all_ended() -> bool:
            _, answer, _ = ask(connection, "GET", "/v1/runs")
            ended.update({run["id"]: run["state"] for run in answer["data"]})
            return not {"queued", "running"} & set(ended.values())

        with service(["model=zimage_nano"], str(self._root)) as (port, process):
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
            end = time.monotonic() + END_S
            while not all_ended():
                if time.monotonic() > end:
                    self._wrong.append("runs do not end")
                    break
                time.sleep(0.2)
            process.send_signal(signal.SIGTERM)
            if process.wait(60) != 0:
                self._wrong.append(f"the last service ended with {process.returncode}")
        given_up = sum(self._check(run, ended.get(run["id"], "forgotten")) for run in self._runs)
        return dict(Counter(ended.values())), given_up

    def _check(self, run: dict[str, Any], state: str) -> int:
        """Look at what a run has on disk. Return the items that were given up."""
        directory = self._root / run["directory"]
        lines = [json.loads(line) for line in (directory / "records.jsonl").read_bytes().splitlines()]
        drawn = Counter(line["seed"] for line in lines if line["status"] == "ok")
        failed = {line["seed"] for line in lines if line["status"] != "ok"} - set(drawn)
        pictures = {json.loads(path.read_bytes())["seed"]: path.parent for path in directory.rglob("record.json")}
        right = (
            set(drawn) | failed == set(range(PICTURES))
            and all(times == 1 for times in drawn.values())
            and state == ("failed" if failed else "done")
            and set(drawn) <= set(pictures)
        )
        if not right:
            self._wrong.append(f"{run['id']} is {state}, drawn {dict(drawn)}, failed {sorted(failed)}")
        for seed in drawn:
            self._compare("a dog", seed, (pictures[seed] / "image.png").read_bytes())
        return len(failed)


def _lives(pid: int) -> bool:
    """Whether a process runs: one that only waits for its parent to ask for its exit code does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


if __name__ == "__main__":
    sys.exit(main())
