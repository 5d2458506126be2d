"""Draw pictures and runs that are asked for over HTTP, with one model that is warm before the first request.

    python -m zimage_runner serve +experiment=turbo [group=option] [server.port=8189] [server.token_file=FILE]

POST /v1/images/generations   OpenAI's form: prompt, n, size, response_format; also seed, num_inference_steps,
                              guidance_scale, negative_prompt
POST /v1/images/edits         the same from a picture: a form with image, mask, control_image, strength, fit ...
POST /v1/runs                 prompts x seeds as an ordinary run on disk; GET /v1/runs/ID, /events, /pictures; DELETE
GET  /v1/models, /ready, /live, /metrics

The words are those of a run, without its prompts and seeds; executor=inline keeps the model in this process.
Only this machine may ask, unless server.host is another address; then it takes a token, or server.insecure=true.
--help server lists the service's own fields. Needs the extra web: pip install 'zimage-runner[web]'.
SIGTERM and Ctrl-C end it after the pictures in flight. Exit codes: 0 ended, 1 no model could be started, 2 bad input.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from zimage_runner.errors import EXIT_BAD_INPUT, EXIT_INTERRUPTED, EXIT_ITEMS_FAILED, EXIT_OK, UserError, called
from zimage_runner.logs import refuse, say
from zimage_runner.view.address import check_installed

if TYPE_CHECKING:
    import socket

    from zimage_runner.config.schema import Composed

MOST_CONNECTIONS = 2000
"""Open at the same time; uvicorn answers 503 beyond it."""
ENDS = (signal.SIGTERM, signal.SIGINT)


def main(argv: Sequence[str]) -> int:
    """Run one command line and return its exit code."""
    if {"-h", "--help"} & set(argv):
        return _help(argv)
    from zimage_runner.cli.main import main as compose
    from zimage_runner.serve.settings import Settings, check_words

    found: list[Composed] = []

    def take(composed: Composed) -> int:
        found.append(composed)
        composed.remove_unused_directory()
        return EXIT_OK

    try:
        with _ends_at_once():
            check_installed("fastapi", "uvicorn", "python_multipart")
            check_words(argv)
            code = compose(argv, take, serves=True)
            if code != EXIT_OK or not found:  # refused, or the words were --cfg
                return code
            settings = Settings.of(found[0])
            try:
                return serve(settings, settings.server.secret())
            finally:
                found[0].remove_unused_directory()  # what is above it, where nothing was kept
    except UserError as error:
        return refuse(str(error))


@contextlib.contextmanager
def _ends_at_once() -> Iterator[None]:
    """A signal ends the process cleanly, also where the service does not listen to signals yet, or no more."""

    from zimage_runner.cli.main import remove_unused_directory

    def leave(number: int, frame: Any) -> None:
        remove_unused_directory()
        os._exit(EXIT_OK)

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, leave) for number in ENDS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def serve(settings: Any, token: str | None) -> int:
    """Listen, load, and answer until a signal says otherwise. Return the exit code. Raises UserError."""
    from zimage_runner.view.address import listen, shown

    server = settings.server
    listener = listen(server.host, [server.port], "server.")  # a bad address is told before anything is loaded
    with contextlib.closing(listener):
        import uvicorn

        from zimage_runner.serve.app import application
        from zimage_runner.serve.service import Service

        logging.getLogger("python_multipart").disabled = True  # what is wrong with a form is told to who sent it
        service = Service(settings)
        config = uvicorn.Config(
            application(service, token),
            log_level="warning",
            access_log=False,
            server_header=False,
            proxy_headers=False,
            limit_concurrency=MOST_CONNECTIONS,
            timeout_graceful_shutdown=max(1, round(server.drain_s)),
            lifespan="on",
        )
        say(f"http://{shown(server.host)}:{listener.getsockname()[1]}", sys.stdout)
        if server.insecure and not server.is_local and token is None:
            say("zimage_runner: server.insecure=true: whoever reaches this address may draw")
        try:
            code = _answer(config, service, listener)
        finally:
            ended = service.close()
        if not ended:
            say("the model did not end in time: leaving it; finished pictures are kept")
            os._exit(code)
        return code


def _answer(config: Any, service: Any, listener: socket.socket) -> int:
    """Serve until a signal comes, or no model can be had."""
    import uvicorn

    class Server(uvicorn.Server):
        """Ends with an exit code of ours: uvicorn would send itself the signal once more."""

        @contextlib.contextmanager
        def capture_signals(self) -> Iterator[None]:
            before = {number: signal.signal(number, self.handle_exit) for number in ENDS}
            try:
                yield
            finally:
                for number, handler in before.items():
                    signal.signal(number, handler)

        def handle_exit(self, sig: int, frame: Any) -> None:
            if service.draining.is_set():
                say("exiting at once; finished pictures are kept")
                os._exit(EXIT_INTERRUPTED)
            service.draining.set()
            say(f"{signal.Signals(sig).name}: finishing what was asked for; once more to exit at once")
            self.should_exit = True

    server = Server(config)

    def watch() -> None:
        service.scheduler.gave_up.wait()
        service.draining.set()
        server.should_exit = True

    threading.Thread(target=watch, name="watch", daemon=True).start()
    server.run(sockets=[listener])
    if not service.scheduler.gave_up.is_set():
        return EXIT_OK
    return EXIT_BAD_INPUT if service.scheduler.refused else EXIT_ITEMS_FAILED


def _help(argv: Sequence[str]) -> int:
    """The fields of a group that stands beside --help, else this command's own text."""
    words = [word for word in argv if word not in ("-h", "--help")]
    if not words:
        print(called(__doc__ or ""))
        return EXIT_OK
    from zimage_runner.cli.help import help_text

    try:
        return EXIT_OK if say(help_text(argv).removesuffix("\n"), sys.stdout) else EXIT_BAD_INPUT
    except UserError as error:
        return refuse(str(error))


if __name__ == "__main__":
    from zimage_runner.startup.process import begin

    begin()
    sys.exit(main(sys.argv[1:]))
