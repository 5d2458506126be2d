"""Completion of the command line in bash, zsh and fish: ``zimage-runner --shell-completion install=bash``.

What may come next is Hydra's to say; the shells' functions, the commands and words that Hydra does not read are here.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import itertools
import os
import re
from collections.abc import Mapping, Sequence

from zimage_runner.cli.commands import COMMANDS, MODULES, RUN
from zimage_runner.errors import SCRIPT, UserError

OPTIONS = ("--shell-completion", "-sc")
INSTALL = {
    "bash": """\
_zimage_runner() {
    local IFS=$'\\n' typed="${COMP_LINE:0:COMP_POINT}"
    local word="${typed##*[[:space:]]}"
    COMPREPLY=($(COMP_LINE="$COMP_LINE" COMP_POINT="$COMP_POINT" zimage-runner -sc query=bash 2>/dev/null))
    # Bash replaces what comes after the last = alone.
    [[ $COMP_WORDBREAKS == *=* ]] && COMPREPLY=("${COMPREPLY[@]#"${word%"${word##*=}"}"}")
}
complete -o nospace -o default -F _zimage_runner zimage-runner
""",
    "zsh": """\
_zimage_runner() {
    local -a found
    found=(${(f)"$(COMP_LINE="$BUFFER" COMP_POINT="$CURSOR" zimage-runner -sc query=zsh 2>/dev/null)"})
    if (( $#found )); then
        compadd -S '' -- $found
    else
        compset -P '*='
        _files
    fi
}
compdef _zimage_runner zimage-runner
""",
    "fish": """\
complete -c zimage-runner -a '(COMP_LINE=(commandline -cp) zimage-runner -sc query=fish 2>/dev/null)'
""",
}
"""What a shell reads."""
UNINSTALL = {
    "bash": "complete -r zimage-runner; unset -f _zimage_runner\n",
    "zsh": "compdef -d zimage-runner; unfunction _zimage_runner\n",
    "fish": "complete -e -c zimage-runner\n",
}
_PLAIN = re.compile(r"[+~]{0,2}[\w./@]+=[\w./,@-]*|-m|--multirun")
"""Words that Hydra is asked to take into account; prompts and other free text change nothing."""
_FIELD = re.compile(r"^([a-z_]+) {2,}\S|[ \[]([a-z_]+)=", re.M)
"""A command's field in its own help."""


def completion(argv: Sequence[str], environment: Mapping[str, str] = os.environ) -> str:
    """What a shell is to read: its function, or the words that may stand at the cursor. Raises UserError."""
    words = [word for word in argv if word not in OPTIONS]
    action, _, shell = (words[0] if len(words) == 1 else "").partition("=")
    if action not in ("install", "uninstall", "query") or shell not in INSTALL:
        raise UserError(f"--shell-completion: write install=, uninstall= or query= and one of {', '.join(INSTALL)}")
    if action != "query":
        return (INSTALL if action == "install" else UNINSTALL)[shell]
    line = environment.get("COMP_LINE", "")
    return "\n".join(candidates(line[: int(environment.get("COMP_POINT", len(line)))]))


def candidates(typed: str) -> list[str]:
    """Words that may stand where the typed command line ends, in order."""
    *before, last = re.split(r"\s+", typed)
    before = before[1:]  # the program
    first = before[0] if before else None
    if first in MODULES:
        text = importlib.import_module(MODULES[first]).__doc__ or ""
        found = [f"{listed or shown}=" for listed, shown in _FIELD.findall(text)]
    else:
        found = [*COMMANDS] if not before else []
        found.append("continue=")  # replaced before Hydra reads the words (resume/command_line.py)
        found += _asked_of_hydra(before[1:] if first == RUN else before, last)
    return sorted({word for word in found if word.startswith(last) and not word.startswith("schema")})


def _asked_of_hydra(before: Sequence[str], last: str) -> list[str]:
    from zimage_runner.cli.main import main

    folder = [word for name, word in itertools.pairwise(before) if name in ("--config-dir", "-cd")]
    folder += [word.partition("=")[2] for word in before if word.startswith("--config-dir=")]
    words = [word for word in before if _PLAIN.fullmatch(word) and not word.startswith("continue=")]
    os.environ["COMP_LINE"] = " ".join([SCRIPT, *words, last])
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(io.StringIO()):
        main(["--shell-completion", "query=fish", *(f"--config-dir={name}" for name in folder[-1:])])
    return out.getvalue().split()
