"""Start a resident process: in a session of its own, with none of this process' descriptors."""

from __future__ import annotations

import json
import subprocess
import sys

from zimage_runner.errors import UserError

_BOOT = (
    "import sys; sys.path[:] = {path!r}; "
    "from zimage_runner.startup.process import begin; begin(warns=False); "
    "from zimage_runner.resident.process import start; start()"
)
"""What the process executes: a process entry, like ``__main__``."""
TAKEN = 3


def spawn(name: str, likeness: dict[str, str]) -> bool:
    """Start it and wait until it listens; False where another one has the address. Raises UserError."""
    flags = subprocess._args_from_interpreter_flags()  # pyright: ignore[reportAttributeAccessIssue]
    path = sys.path if sys.flags.safe_path else sys.path[1:]
    # The folder that the command was given in comes with each run; the first of all may hold this package itself.
    package = __file__.removesuffix("/zimage_runner/resident/spawn.py")
    boot = _BOOT.format(path=path if package in path else [*path, package])
    command = [sys.executable, *flags, *([] if "-P" in flags else ["-P"]), "-c", boot]
    try:
        process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            cwd="/",
            start_new_session=True,
        )
        told = json.dumps({"name": name, "likeness": likeness}).encode()
        errors = process.communicate(told)[1].decode("utf-8", "replace")
    except OSError as error:
        raise UserError(
            f"executor=resident: the process cannot be started ({error.strerror or error}): raise the limit of "
            "processes (ulimit -u) or of memory, or use executor=inline"
        ) from None
    if process.returncode == TAKEN:
        return False
    if process.returncode != 0:
        last = errors.strip().splitlines()[-1:] or [f"exit code {process.returncode}"]
        raise UserError(f"executor=resident: the process cannot be started: {last[0]}")
    return True
