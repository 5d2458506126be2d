"""The Dockerfile and the systemd unit of docs/serve.md say what this package, its service and its extras are called."""

from __future__ import annotations

import json
import re
import shlex
import tomllib
from pathlib import Path
from urllib.parse import urlsplit

from zimage_runner.cli.main import main as compose
from zimage_runner.config.schema import Composed, ServeConfig
from zimage_runner.errors import EXIT_BAD_INPUT
from zimage_runner.serve.settings import Settings, check_words

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "serve.md").read_text(encoding="utf-8")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
PROGRAM = ["python", "-m", "zimage_runner", "serve"]


def block(language: str) -> str:
    """A code block of the page, each command in one line."""
    (text,) = re.findall(rf"```{language}\n(.*?)```", PAGE, re.S)
    return re.sub(r"\\\n\s*", "", text)


def settings(words: list[str]) -> Settings:
    """What a command line of the service means, composed as the service does it."""
    found: list[Composed] = []
    check_words(words)
    assert compose(words, lambda composed: found.append(composed) or 0, serves=True) == 0
    found[0].remove_unused_directory()
    assert isinstance(found[0].config, ServeConfig)
    return Settings.of(found[0])


def test_the_dockerfile(serve, tmp_path):
    lines = [line.split(" ", 1) for line in block("dockerfile").splitlines()]
    said = {name: rest for name, rest in lines if name not in ("WORKDIR", "RUN")}
    (install,) = (rest for name, rest in lines if name == "RUN")
    oldest = re.search(r"\d+\.(\d+)", PROJECT["requires-python"])
    image = re.fullmatch(r"python:3\.(\d+)-slim", said["FROM"])
    assert oldest is not None
    assert image is not None
    assert int(image[1]) >= int(oldest[1])
    (extra,) = re.findall(r"pip install --no-cache-dir '\.\[(\w+)\]'", install)
    assert "uvicorn" in str(PROJECT["optional-dependencies"][extra])
    program, words = json.loads(said["ENTRYPOINT"]), json.loads(said["CMD"])
    assert program[:4] == PROGRAM
    server = settings([*program[4:], *words]).server
    assert server.host == "0.0.0.0"
    check = json.loads(said["HEALTHCHECK"].partition(" CMD ")[2])
    url = urlsplit(re.findall(r"'(http://.*?)'", check[-1])[0])
    assert server.port == url.port == int(said["EXPOSE"])
    compile(check[-1], "healthcheck", "exec")
    assert serve().get(url.path).status_code == 200
    run = shlex.split(next(line for line in PAGE.splitlines() if line.startswith("docker run")))
    assert f"127.0.0.1:{server.port}:{server.port}" in run
    assert f"./token:{server.token_file}:ro" in run
    assert f"zimage:{said['VOLUME']}" in run
    assert int(run[run.index("--stop-timeout") + 1]) > server.drain_s, "else Docker kills what is being drawn"


def test_what_docker_does_not_copy_is_not_needed():
    kept_out = (ROOT / ".dockerignore").read_text(encoding="utf-8").split()
    assert ".venv" in kept_out
    for needed in ("zimage_runner", "pyproject.toml", "README.md", "LICENSE", "conf"):
        assert needed not in kept_out


def test_the_systemd_unit(tmp_path, monkeypatch):
    said = dict(line.split("=", 1) for line in block("ini").splitlines() if "=" in line)
    words = said["ExecStart"].replace("%d", str(tmp_path)).split()
    assert [Path(words[0]).name, *words[1:4]] == PROGRAM
    found = settings(words[4:])
    assert found.config.memory.health.action.value == "recycle"
    (tmp_path / said["LoadCredential"].partition(":")[0]).write_text("0123456789abcdef\n", encoding="utf-8")
    assert found.server.secret() == "0123456789abcdef"
    assert int(said["TimeoutStopSec"]) > found.server.drain_s
    assert said["Restart"] == "on-failure"
    assert int(said["RestartPreventExitStatus"]) == EXIT_BAD_INPUT
