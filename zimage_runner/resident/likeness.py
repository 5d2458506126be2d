"""What must be the same in the command's process and in the resident one, or the run would not be that of inline.

A process reads most of this only once: when it starts, or when a library is imported. What can be taken over for each
run (folder, umask, streams, variables of a terminal) is caller.py's.
"""

from __future__ import annotations

import os
import sys

from zimage_runner import __version__

OF_A_TERMINAL = frozenset(
    ("PWD", "OLDPWD", "SHLVL", "_", "TERM", "COLORTERM", "COLUMNS", "LINES", "WINDOWID", "DISPLAY", "WAYLAND_DISPLAY",
     "XAUTHORITY", "STY", "WINDOW", "GPG_TTY", "INVOCATION_ID", "JOURNAL_STREAM", "MAIL", "PAGER", "EDITOR", "VISUAL",
     "PS1", "PS2", "PS4", "LS_COLORS", "NO_COLOR", "FORCE_COLOR", "CLICOLOR", "TZ", "PYTEST_CURRENT_TEST", "MAKELEVEL",
     "DESKTOP_STARTUP_ID", "VTE_VERSION", "VIRTUAL_ENV_PROMPT", "MANAGERPID", "SYSTEMD_EXEC_PID", "PYTEST_XDIST_WORKER")
)  # fmt: skip
OF_TERMINALS = ("SSH_", "TMUX", "TERM_", "XDG_SESSION", "XDG_VTNR", "XDG_SEAT", "GNOME_TERMINAL", "KONSOLE_", "KITTY_",
                "ITERM_", "LC_TERMINAL", "WT_", "VSCODE_", "WEZTERM_", "ALACRITTY_", "DBUS_", "LESS", "HIST", "ZSH",
                "BASH", "PROMPT", "STARSHIP_")  # fmt: skip
"""Variables that differ from one terminal to the next; no library reads them when it starts. Each run gets its own."""


def of_this_process() -> dict[str, str]:
    """Name and value of each thing; environment variables as ``$NAME``."""
    found = {
        "version": __version__,
        "program": _program(),
        "Python": f"{sys.executable} {sys.version} {sys.flags} {sorted(sys._xoptions.items())}",
        "module path": repr(sys.path[1:]),
        "libraries": repr(_installed()),
        "user": repr((os.getuid(), os.geteuid(), os.getgid(), sorted(os.getgroups()))),
        "CPUs": repr(sorted(os.sched_getaffinity(0))),
        "priority": str(os.getpriority(os.PRIO_PROCESS, 0)),
        "limits": repr(_limits()),
    }
    return found | {f"${name}": value for name, value in os.environ.items() if not of_a_terminal(name)}


def of_a_terminal(name: str) -> bool:
    """Whether an environment variable says something of a terminal or a session alone."""
    return name in OF_A_TERMINAL or name.startswith(OF_TERMINALS)


def differences(mine: dict[str, str], other: dict[str, str]) -> list[str]:
    """Names of what is not the same."""
    return sorted(name for name in {*mine, *other} if mine.get(name) != other.get(name))


def _program() -> str:
    """This package's files as they are on disk: a process that stays has read them long ago."""
    package = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    beside = os.path.join(os.path.dirname(package), "conf")  # in a checkout; in a wheel it is inside
    waiting = [package, *([beside] if os.path.isdir(beside) else [])]
    newest, count, size = 0, 0, 0
    while waiting:
        with os.scandir(waiting.pop()) as entries:
            for entry in entries:
                if entry.is_dir(follow_symlinks=False):
                    if entry.name != "__pycache__":
                        waiting.append(entry.path)
                elif entry.name.endswith((".py", ".yaml")):
                    status = entry.stat()
                    newest, count, size = max(newest, status.st_mtime_ns), count + 1, size + status.st_size
    return f"{package} {count} {size} {newest}"


def _installed() -> list[str]:
    """Names with versions of what is installed beside the libraries that draw."""
    found = []
    for folder in sys.path[1:]:
        if folder.endswith(("site-packages", "dist-packages")) and os.path.isdir(folder):
            found += [name for name in os.listdir(folder) if name.endswith(".dist-info")]
    return sorted(found)


def _limits() -> dict[str, tuple[int, int]]:
    import resource

    return {name: resource.getrlimit(getattr(resource, name)) for name in dir(resource) if name.startswith("RLIMIT_")}
