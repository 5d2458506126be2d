"""The ``server`` config group: where the service listens, who may ask, and how much at a time."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, field
from pathlib import Path

from zimage_runner.errors import UserError, check_range
from zimage_runner.model import FREE_TEXT

SHORTEST_TOKEN = 16
CHARACTERS_OF_A_TOKEN = re.compile(rf"[!-~]{{{SHORTEST_TOKEN},500}}")
LIMITS: dict[str, tuple[float, float]] = {
    "port": (0, 65535),
    "queue": (1, 100_000),
    "max_images": (1, 1000),
    "max_megapixels": (0.001, 17.0),
    "max_upload_megapixels": (0.001, 100.0),
    "max_steps": (1, 1000),
    "max_prompt_characters": (1, 1_000_000),
    "max_body_mb": (0.001, 1000),
    "max_runs": (1, 10_000),
    "max_run_images": (1, 10_000_000),
    "request_timeout_s": (0.01, 86_400),
    "body_timeout_s": (0.01, 3600),
    "drain_s": (0, 86_400),
    "url_minutes": (0.01, 100_000),
    "url_mb": (1, 1_000_000),
}


@dataclass(kw_only=True, slots=True)
class Server:
    """The only option: every field has a default that is safe on this machine."""

    host: str = "127.0.0.1"
    """Address to listen at. Any other than this machine's own needs a token, or insecure=true."""
    port: int = 8189
    """0 takes a free one, which is printed."""
    token: str | None = field(default=None, metadata=FREE_TEXT)
    """Whoever asks has to send it: ``Authorization: Bearer TOKEN``. At least 16 letters, digits and signs."""
    token_file: str | None = field(default=None, metadata=FREE_TEXT)
    """File that holds the token, so that it stands in no list of processes."""
    insecure: bool = False
    """Let anybody ask who can reach the address, without a token."""
    queue: int = 64
    """Pictures of requests that may wait; more are answered 429. A run's pictures wait in its own folder."""
    max_images: int = 10
    """Largest n of a request."""
    max_megapixels: float = 4.2
    """Largest picture, in millions of pixels; 2048x2048 is 4.2."""
    max_upload_megapixels: float = 25.0
    """Largest picture that is sent to be edited, in millions of pixels."""
    max_steps: int = 100
    """Largest num_inference_steps."""
    max_prompt_characters: int = 20_000
    """Longest prompt, and longest negative prompt."""
    max_body_mb: float = 8.0
    """Largest request, in millions of bytes."""
    max_runs: int = 16
    """Runs that may wait or be drawn; more are answered 429."""
    max_run_images: int = 100_000
    """Pictures of the largest run."""
    request_timeout_s: float = 600.0
    """A request that is not drawn by then is answered 504, and its place is free."""
    body_timeout_s: float = 30.0
    """A request that has not arrived as a whole by then is answered 408."""
    drain_s: float = 30.0
    """Seconds that requests already taken may last after SIGTERM."""
    url_minutes: float = 60.0
    """How long a picture asked for as a URL is kept."""
    url_mb: float = 512.0
    """Memory for such pictures, in millions of bytes; the oldest go first."""
    warm_sizes: list[str] = field(default_factory=list)
    """Sizes to be warm at besides that of sampling, such as [512x512,1024x768]."""
    warm_caption_tokens: list[int] = field(default_factory=lambda: [32, 64, 128])
    """Lengths of captions to be warm at, in tokens."""
    log_prompts: bool = False
    """Write each prompt into the log."""

    def __post_init__(self) -> None:
        for name, (low, high) in LIMITS.items():
            check_range(f"server.{name}", getattr(self, name), low, high)
        if self.max_images > self.queue:
            raise UserError(f"server.max_images={self.max_images} is more than server.queue={self.queue}: raise queue")
        for size in self.warm_sizes:
            parse_size(size, "server.warm_sizes")
        for tokens in self.warm_caption_tokens:
            check_range("server.warm_caption_tokens", tokens, 1, 1024)
        if self.token is not None and self.token_file is not None:
            raise UserError("server.token and server.token_file are both set: keep one")
        if self.token is not None:
            _check_token(self.token, "server.token")
        if self.secret_source is None and not self.insecure and not self.is_local:
            raise UserError(
                f"server.host={self.host} lets other machines ask: set server.token_file=FILE (or server.token=TEXT), "
                "or server.insecure=true to let anybody ask"
            )

    @property
    def is_local(self) -> bool:
        """Whether only this machine can reach it."""
        from zimage_runner.view.address import is_loopback

        return is_loopback(self.host)

    @property
    def secret_source(self) -> str | None:
        """The field that says what the token is."""
        names = [name for name in ("token", "token_file") if getattr(self, name) is not None]
        return names[0] if names else None

    def secret(self) -> str | None:
        """The token, read from its file where there is one. Raises UserError."""
        if self.token_file is None:
            return self.token
        try:
            text = Path(os.path.expanduser(self.token_file)).read_text(encoding="utf-8").strip()
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or "it is not text"
            raise UserError(f"server.token_file={self.token_file} cannot be read: {reason}") from None
        _check_token(text, f"server.token_file={self.token_file}")
        return text


def parse_size(text: str, field: str) -> tuple[int, int]:
    """(width, height) of "1024x768". Raises UserError."""
    match = re.fullmatch(r"([0-9]{1,9})x([0-9]{1,9})", text)
    if match is None:
        raise UserError(f"{field}={text[:40]!r}: write a size as WIDTHxHEIGHT, such as 1024x1024")
    return int(match[1]), int(match[2])


def _check_token(text: str, field: str) -> None:
    """The token itself is not repeated: messages end in logs."""
    if not CHARACTERS_OF_A_TOKEN.fullmatch(text):
        raise UserError(f"{field}: a token has {SHORTEST_TOKEN} to 500 letters, digits and signs, without blanks")
