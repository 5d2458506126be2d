"""Load on the service: requests from many clients at once, and how long they take.

    python -m benchmarks.serve [--requests 1000] [--clients 32] [--soak MINUTES] [--output FILE] [word ...]

Words are those of ``zimage_runner serve``; without any it draws with the embedded model. Each client keeps one
connection and asks again as soon as it is answered. A request that is answered 429 counts as refused, is asked again
after what Retry-After says, and its time goes on. Seconds are those of the clients; those in the queue are the
service's own. Before that, one client alone asks a few times: is the first request after ready as fast as later ones?
--soak goes on for so long, and says what memory and descriptors of the service and of its worker did meanwhile.
"""

from __future__ import annotations

import argparse
import contextlib
import http.client
import itertools
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks import machine

START_SECONDS = 600.0
ROUTE = "/v1/images/generations"
ALONE = 6
PROMPTS = ("a red apple", "a cute cat face", "一只熊猫", "a sailboat on the sea")


def main() -> int:
    parser = argparse.ArgumentParser(description="load on the service")
    parser.add_argument("--requests", type=int, default=1000)
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--soak", type=float, default=0.0, help="minutes of load afterwards, watched")
    parser.add_argument("--output", type=Path, help="write the JSON here too")
    parser.add_argument("words", nargs="*")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, service(args.words, folder) as (port, process):
        result = measure(port, args.requests, args.clients)
        result["words"] = args.words
        result["memory"] = memory_of(process.pid)
        if args.soak:
            result["soak"] = soak(port, process.pid, args.soak * 60, args.clients)
        process.send_signal(signal.SIGTERM)
        result["exit_code"] = process.wait(60)
    machine.report(result, args.output)
    errors = result["errors"] + result.get("soak", {}).get("errors", 0)
    return 0 if not errors and result["exit_code"] == 0 else 1


@contextlib.contextmanager
def service(words: Sequence[str], folder: str) -> Iterator[tuple[int, subprocess.Popen[str]]]:
    """A service that is ready: its port and its process."""
    argv = [*words, "server.port=0", f"output.root={folder}"]
    process = subprocess.Popen(
        [sys.executable, "-m", "zimage_runner", "serve", *argv], stdout=subprocess.PIPE, encoding="utf-8"
    )
    try:
        assert process.stdout is not None
        address = process.stdout.readline().strip()
        if not address:
            raise RuntimeError(f"the service ended with {process.wait()}")
        port, end = int(address.rpartition(":")[2]), time.monotonic() + START_SECONDS
        while ask(http.client.HTTPConnection("127.0.0.1", port), "GET", "/ready")[0] != 200:
            if process.poll() is not None or time.monotonic() > end:
                raise RuntimeError("the service does not get ready")
            time.sleep(0.05)
        yield port, process
    finally:
        process.kill()
        process.wait()


def ask(connection: http.client.HTTPConnection, method: str, route: str, body: Any = None) -> tuple[int, Any, float]:
    """Status, JSON, and seconds to wait before asking again."""
    headers = {} if body is None else {"content-type": "application/json"}
    connection.request(method, route, None if body is None else json.dumps(body), headers)
    answer = connection.getresponse()
    return answer.status, json.loads(answer.read()), float(answer.headers.get("retry-after") or 0)


class Answers:
    """What clients were told, and how long they waited."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.in_queue: list[float] = []
        self.errors: list[str] = []
        self.refused: list[int] = []
        """Numbers of requests that were asked again."""


def measure(port: int, requests: int, clients: int) -> dict[str, Any]:
    """Errors, refusals and percentiles of ``requests`` requests of one picture each."""
    first, answers = Answers(), Answers()
    ask_in_turn(port, iter(range(ALONE)), first)
    began = time.perf_counter()
    for thread in start_clients(port, clients, iter(range(requests)), answers):
        thread.join()
    took = time.perf_counter() - began
    errors = first.errors + answers.errors
    return {
        "requests": requests,
        "clients": clients,
        "one_after_another_seconds": first.seconds,
        "errors": len(errors),
        "first_errors": errors[:5],
        "refused_and_asked_again": len(first.refused) + len(answers.refused),
        "requests_per_second": len(answers.seconds) / took,
        "seconds": percentiles(answers.seconds),
        "seconds_in_queue": percentiles(answers.in_queue),
    }


def soak(port: int, pid: int, seconds: float, clients: int) -> dict[str, Any]:
    """Requests for so long; memory and descriptors at each tenth of the time."""
    end, answers = time.monotonic() + seconds, Answers()
    # No generator, which only one client at a time might ask for a number.
    threads = start_clients(
        port, clients, itertools.takewhile(lambda _: time.monotonic() < end, itertools.count()), answers
    )
    samples = []
    for _ in range(10):
        time.sleep(seconds / 10)
        samples.append([memory_of(one) for one in (pid, *children_of(pid))])
    for thread in threads:
        thread.join()
    return {"seconds": seconds, "requests": len(answers.seconds), "errors": len(answers.errors),
            "first_errors": answers.errors[:5], "service_and_worker": samples}  # fmt: skip


def start_clients(port: int, clients: int, numbers: Iterator[int], answers: Answers) -> list[threading.Thread]:
    """Clients that each ask again as soon as they are answered, until there are no more numbers."""
    threads = [threading.Thread(target=ask_in_turn, args=(port, numbers, answers)) for _ in range(clients)]
    for thread in threads:
        thread.start()
    return threads


def ask_in_turn(port: int, numbers: Iterator[int], answers: Answers) -> None:
    """One client: a request for each number it gets."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=600)
    for number in numbers:
        fields = {"prompt": PROMPTS[number % len(PROMPTS)], "seed": number}
        began = time.perf_counter()
        try:
            status, answer, pause = ask(connection, "POST", ROUTE, fields)
            while status == 429:
                answers.refused.append(number)
                time.sleep(pause)
                status, answer, pause = ask(connection, "POST", ROUTE, fields)
        except (OSError, http.client.HTTPException) as error:
            answers.errors.append(repr(error))
            connection.close()
            continue
        if status != 200:
            answers.errors.append(f"{status}: {answer}")
            continue
        answers.seconds.append(time.perf_counter() - began)
        answers.in_queue.append(answer["queue_seconds"])


def children_of(pid: int) -> list[int]:
    """A process's children, in the order of their start."""
    found = Path(f"/proc/{pid}/task").glob("*/children")
    return sorted(int(child) for path in found for child in path.read_text(encoding="utf-8").split())


def percentiles(values: Sequence[float]) -> dict[str, float]:
    """p50, p95, p99 and the largest; empty for fewer than two values."""
    if len(values) < 2:
        return {}
    cuts = statistics.quantiles(values, n=100, method="inclusive")
    return {"p50": cuts[49], "p95": cuts[94], "p99": cuts[98], "max": max(values)}


def memory_of(pid: int) -> dict[str, int]:
    """Resident bytes and open descriptors of the service's own process."""
    pages = int(Path(f"/proc/{pid}/statm").read_text(encoding="utf-8").split()[1])
    return {"resident_bytes": pages * os.sysconf("SC_PAGE_SIZE"), "descriptors": len(os.listdir(f"/proc/{pid}/fd"))}


if __name__ == "__main__":
    sys.exit(main())
