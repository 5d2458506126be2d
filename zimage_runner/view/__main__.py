"""Look at runs in a browser, also while they are drawn.

    python -m zimage_runner view [FOLDER] [--open] [port=8188] [host=127.0.0.1] [token=TEXT] [cache_gb=2]

FOLDER    a folder of runs, a multirun, one run, or latest (default: outputs); links in it are not followed
--open    show the page in the browser
port      0 takes a free one; where 8188 is taken and port is not given, a free one too
host      another address than this machine's own lets others look as well: then a token is needed, which is made up
          unless it is given, and is part of the address that is printed
cache_gb  room for thumbnails in the cache folder

Stars and rejections are the only thing that is written to a run: stars.json in its folder.
Needs the extra web: pip install 'zimage-runner[web]'. Ctrl-C ends it. Exit codes: 0 ended, 2 bad input.
"""

from __future__ import annotations

import os
import re
import secrets
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from zimage_runner.errors import EXIT_OK, UserError
from zimage_runner.logs import command
from zimage_runner.view.address import check_installed, is_loopback, listen, shown
from zimage_runner.view.runs import named

PORT = 8188
FIELDS = ("port", "host", "token", "cache_gb")
SHORTEST_TOKEN = 12
GB = 1e9


@dataclass(frozen=True, kw_only=True, slots=True)
class Options:
    """The command line."""

    folder: str = "outputs"
    port: int | None = None
    host: str = "127.0.0.1"
    token: str | None = None
    cache_gb: float = 2.0
    open: bool = False

    @property
    def is_local(self) -> bool:
        """True if only this machine can reach it."""
        return is_loopback(self.host)


def main(argv: Sequence[str]) -> int:
    """Run one command line and return its exit code."""
    return command(argv, __doc__, lambda words: _serve(parse(words)), bare=True)


def parse(argv: Sequence[str]) -> Options:
    """Options from the words of a command line. Raises UserError."""
    folders, fields = [], {}
    for word in argv:
        match = re.fullmatch(r"(?s)([a-z_]+)=(.*)", word)
        if match and match[1] in FIELDS:
            fields[match[1]] = match[2]
        elif match and not os.path.exists(word):
            raise UserError(f"{word}: no such field; fields here: {', '.join(FIELDS)}")
        elif word.startswith("-") and word != "--open":
            raise UserError(
                f"{word}: no such option; there are --open and --help, and {', '.join(FIELDS)} as field=value"
            )
        elif word != "--open":
            folders.append(word)
    if len(folders) > 1:
        raise UserError(f"{' '.join(folders)}: name one folder; runs below it are all shown")
    options = Options(
        folder=named(folders[0]) if folders else "outputs",
        port=_port(fields.get("port")),
        host=fields.get("host", "127.0.0.1"),
        token=_token(fields.get("token")),
        cache_gb=_gigabytes(fields.get("cache_gb", "2")),
        open="--open" in argv,
    )
    if not os.path.isdir(options.folder):
        raise UserError(f"{options.folder} is no folder: name the one that holds runs, which output.root says")
    if options.token is None and not options.is_local:
        return replace(options, token=secrets.token_urlsafe(18))
    return options


def _port(text: str | None) -> int | None:
    if text is None:
        return None
    if not re.fullmatch(r"[0-9]{1,5}", text) or int(text) > 65535:
        raise UserError(f"port={text}: write a number from 0 to 65535")
    return int(text)


def _token(text: str | None) -> str | None:
    if text is not None and not re.fullmatch(rf"[A-Za-z0-9_-]{{{SHORTEST_TOKEN},200}}", text):
        raise UserError(f"token={text[:20]}: use {SHORTEST_TOKEN} to 200 letters, digits, - and _")
    return text


def _gigabytes(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 1e5:
        raise UserError(f"cache_gb={text}: write a number of GB, such as 2")
    return value


def _serve(options: Options) -> int:
    check_installed("fastapi", "uvicorn")
    ports = [options.port] if options.port is not None else [PORT, 0]
    listener = listen(options.host, ports)  # before anything is imported or read: a bad address is told at once
    import uvicorn

    from zimage_runner.view.gallery import Gallery
    from zimage_runner.view.server import application
    from zimage_runner.weights.cache import cache_root

    class Server(uvicorn.Server):
        """Ends the open pages' events first: uvicorn would wait for them, and tell of it in tracebacks."""

        def handle_exit(self, sig: int, frame: Any) -> None:
            gallery.watcher.dismiss()
            super().handle_exit(sig, frame)

    gallery = Gallery(options.folder, cache_root(), int(options.cache_gb * GB))
    gallery.watcher.start()
    app = application(gallery, local=options.is_local, token=options.token)
    config = uvicorn.Config(
        app, log_level="warning", access_log=False, server_header=False, timeout_graceful_shutdown=1, lifespan="on"
    )
    address = _address(options, listener.getsockname()[1])
    print(address, flush=True)
    if options.open:
        import webbrowser

        webbrowser.open(address)
    try:
        Server(config).run(sockets=[listener])
    except KeyboardInterrupt:  # the usual end: uvicorn raises it again once it has closed
        pass
    finally:
        gallery.close()
    return EXIT_OK


def _address(options: Options, port: int) -> str:
    return f"http://{shown(options.host)}:{port}/" + (f"?token={options.token}" if options.token else "")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
