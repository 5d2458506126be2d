"""The commands beside drawing, by the first word of the command line. Imports nothing: each is imported once called."""

from __future__ import annotations

RUN = "run"
"""The command that the bare form means."""
COMMANDS = {
    RUN: "draw pictures; the word may be left out",
    "collect": "pictures of runs in one folder, or on contact sheets",
    "vary": "neighbours of pictures",
    "enlarge": "larger versions of pictures, drawn from themselves",
    "view": "runs in the browser, also while they are drawn",
    "serve": "pictures and runs over HTTP, by one model that stays warm",
    "status": "state, counts, pace and failures of runs",
    "reproduce": "draw a picture again from its file, and compare",
    "compare": "how far apart the pictures of two runs are",
    "resident": "the process of executor=resident: its state, and its end",
    "prepare": "fetch, check and prepare a model's weights",
}
"""Name and what it does."""
MODULES = {name: f"zimage_runner.{name}" for name in ("reproduce", "compare", "prepare")} | {
    "collect": "zimage_runner.collect.__main__",
    "view": "zimage_runner.view.__main__",
    "resident": "zimage_runner.resident.__main__",
    "serve": "zimage_runner.serve.__main__",
    "status": "zimage_runner.view.status",
    "vary": "zimage_runner.cli.vary",
    "enlarge": "zimage_runner.cli.enlarge",
}
"""Where each one's ``main(argv) -> exit code`` is; ``run`` is the program's own."""
DRAWING = ("reproduce", "prepare", "serve", "vary", "enlarge")
"""Those that import torch: they begin as a run does (startup/)."""
HELP = ("--help", "-h")


def command_of(argv: list[str]) -> tuple[str, list[str]]:
    """The command that a command line names, and its own words; ``run`` for the bare form.

    ``--help collect`` is ``collect --help``. ``--help run`` remains: it lists the fields of a run.
    """
    if argv[:1] and argv[0] in COMMANDS:
        return argv[0], argv[1:]
    if len(argv) == 2 and argv[0] in HELP and argv[1] in MODULES:
        return argv[1], argv[:1]
    return RUN, argv
