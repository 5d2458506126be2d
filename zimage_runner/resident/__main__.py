"""``python -m zimage_runner resident status|stop``: the processes of ``executor=resident`` on this machine."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from typing import Any

from zimage_runner.errors import EXIT_BAD_INPUT, EXIT_OK, UserError, counted, one_line
from zimage_runner.logs import duration, refuse, say
from zimage_runner.resident.address import Folder, folder
from zimage_runner.resident.messages import Closed, receive, send

HELP = """usage: python -m zimage_runner resident status | stop

The process of executor=resident, which keeps a model loaded between commands. There is one for each choice of GPUs
(CUDA_VISIBLE_DEVICES). It ends by itself after executor.idle_minutes without a run.

  status   what it has loaded, what it draws, and how many commands wait
  stop     have it end after the runs that it has taken; this waits for its end"""
WORDS = ("status", "stop")


def main(argv: Sequence[str]) -> int:
    """Do what the word says. Return the exit code."""
    if {"--help", "-h"} & set(argv):
        return EXIT_OK if say(HELP, sys.stdout) else EXIT_BAD_INPUT
    if len(argv) != 1 or argv[0] not in WORDS:
        return refuse(f"resident {' '.join(argv)}".strip() + ": use resident status, or resident stop")
    try:
        with folder() as here:
            found = [line for name in here.names() if (line := _ask(here, name, argv[0])) is not None]
    except UserError as error:
        return refuse(str(error))
    except KeyboardInterrupt:
        return 130
    return EXIT_OK if say("\n".join(found) or "no resident process", sys.stdout) else EXIT_BAD_INPUT


def _ask(here: Folder, name: str, what: str) -> str | None:
    """A line about one process; None where none is left."""
    connection = here.connect(name)
    if connection is None:
        return None
    with connection:
        connection.settimeout(10)
        try:
            send(connection, {"do": what})
            status = receive(connection)["status"]
        except TimeoutError:
            return f"{name}: the process does not answer"
        except (Closed, KeyError):
            return None
        if what == "status":
            return one_line(_line(status))
        connection.settimeout(None)
        try:
            while True:  # it keeps the connection open until it ends
                receive(connection)
        except Closed:
            return f"process {int(status['pid'])} has ended"


def _line(status: dict[str, Any]) -> str:
    parts = [f"process {status['pid']}", f"model {status['model'] or 'none'}"]
    parts.append(f"draws {status['run']}" if status["run"] else "idle")
    if status["waiting"]:
        parts.append(f"{counted(status['waiting'], 'command waits', 'commands wait')}")
    if status["leaves"]:
        parts.append(f"ends soon: {status['leaves']}")
    parts.append(counted(status["runs"], "run"))
    parts.append(f"{status['memory_bytes'] / 1e9:.1f} GB")
    since, idle = duration(time.time() - status["since"]), duration(status["idle_minutes"] * 60)
    parts.append(f"since {since}, ends {idle} after its last run")
    return ", ".join(parts)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
