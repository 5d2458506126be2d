"""Who may ask, and what stands on a command line."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

import zimage_runner.cli.main
from tests.support.gated_session import GatedSession
from tests.support.serving import body, served
from zimage_runner.errors import UserError
from zimage_runner.serve.config import Server
from zimage_runner.serve.kept import KeptPictures
from zimage_runner.serve.settings import check_words

TOKEN = "0123456789abcdef"
ROUTE = "/v1/images/generations"


def test_a_token_is_asked_for_everywhere_but_for_health():
    with served(token=TOKEN) as client:
        for header in (None, "Bearer", "Bearer 0123456789abcdeF", f"Basic {TOKEN}", f"Bearer {TOKEN}x", "Bearer ü"):
            headers = {} if header is None else {b"authorization": header.encode("latin-1")}
            for route in ("/v1/models", "/metrics", "/v1/runs", "/nothing"):
                answer = client.get(route, headers=headers)
                assert (answer.status_code, answer.json()["error"]["code"]) == (401, "invalid_api_key")
                assert answer.headers["www-authenticate"] == "Bearer"
                assert TOKEN not in answer.text
        assert client.post(ROUTE, json=body()).status_code == 401
        assert [client.get(route).status_code for route in ("/live", "/ready")] == [200, 200]
        assert client.post(ROUTE, json=body(), headers={"authorization": f"bearer {TOKEN}"}).status_code == 200
    assert len(GatedSession.batches) == 1


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"host": "evil.example"}, 403),
        ({"host": "localhost:8189"}, 200),
        ({"host": "[::1]:8189"}, 200),
        ({"origin": "http://evil.example"}, 403),
        ({"origin": "null"}, 403),
        ({"origin": "http://127.0.0.1:8189"}, 200),
    ],
)
def test_pages_of_other_sites_may_not_ask(headers, status):
    with served() as client:
        answer = client.post(ROUTE, json=body(), headers=headers)
        form = client.post("/v1/images/edits", files={"prompt": (None, "a cat")}, headers=headers)
    assert (answer.status_code, form.status_code) == (status, 400 if status == 200 else status)
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert len(GatedSession.batches) == (status == 200)


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"host": "0.0.0.0"}, "server.host=0.0.0.0 lets other machines ask: set server.token_file=FILE"),
        ({"host": "zimage.lan"}, "lets other machines ask"),
        ({"token": "short"}, "server.token: a token has 16 to 500 letters"),
        ({"token": TOKEN, "token_file": "x"}, "are both set: keep one"),
        ({"port": 70000}, "server.port=70000 is out of range"),
        ({"queue": 5}, "server.max_images=10 is more than server.queue=5"),
        ({"warm_sizes": ["big"]}, "server.warm_sizes='big': write a size as WIDTHxHEIGHT"),
        ({"warm_caption_tokens": [0]}, "server.warm_caption_tokens=0 is out of range"),
        ({"drain_s": float("nan")}, "server.drain_s=nan is out of range"),
    ],
)
def test_unsafe_and_impossible_settings_are_refused(fields, text):
    with pytest.raises(UserError) as refused:
        Server(**fields)
    assert text in str(refused.value)
    assert "short" not in str(refused.value), "a token must not get into a log"


def test_where_a_token_comes_from():
    assert Server(host="127.0.0.9").secret() is None
    assert Server(host="0.0.0.0", insecure=True).secret() is None
    Path("token").write_text(f"{TOKEN}\n", encoding="utf-8")
    assert Server(host="0.0.0.0", token_file="token").secret() == TOKEN
    for name, text in (("none", "No such file"), (".", "Is a directory")):
        with pytest.raises(UserError, match=text):
            Server(token_file=name).secret()


@pytest.mark.parametrize(
    ("word", "text"),
    [
        ("-m", "one process with one model"),
        ("prompt=a cat", "each request says what is drawn"),
        ("prompts=csv", "each request says what is drawn"),
        ("seeds=1", "each request says what is drawn"),
        ("resume=latest", "this is of a single run"),
        ("dry_run=true", "this is of a single run"),
        ("hydra.run.dir=x", "this is of a single run"),
        ("output_file=a.png", "this is of a single run"),
    ],
)
def test_words_without_effect_are_refused(word, text):
    with pytest.raises(UserError, match=text):
        check_words(["model=zimage_nano", word])


def test_a_run_has_no_fields_of_the_service(cli, tmp_path):
    (tmp_path / "mine" / "experiment").mkdir(parents=True)
    mine = tmp_path / "mine" / "experiment" / "mine.yaml"
    mine.write_text("# @package _global_\nserver:\n  port: 1\n")
    for words, text in (
        (["server.port=1"], "server.port is of the command serve: python -m zimage_runner serve server.port=1"),
        (["+server.port=1"], "is of the command serve"),
        (["--config-name=serve"], "--config-name=serve is the service's"),
        (["--config-dir=mine", "+experiment=mine"], "server: its fields are of the command serve"),
    ):
        code, _, err = cli("prompt=a cat", *words)
        assert code == 2
        assert text in err
    assert not Path("outputs").exists()


def test_a_service_that_cannot_be_started_is_told_in_one_line(capfd):
    from zimage_runner.serve.__main__ import main

    for words, text in (
        (["memory=staged"], "memory=staged encodes all prompts before the model is loaded"),
        (["executor=ray"], "the service keeps one model: use executor=process"),
        (["server.prot=1"], "server.prot: no such field; did you mean port?"),
        (["server.port=x"], "server.port=x: not a whole number"),
        (["server.host=no.such.host.invalid", "server.insecure=true"], "there is no such address"),
        (["prompt=x"], "each request says what is drawn"),
        (["model.path=/nowhere", "server.port=0"], "cannot be started: model.path=/nowhere: no such directory"),
    ):
        assert main(words) == 2
        err = capfd.readouterr().err
        assert text in err
        assert err.count("\n") == 1, err
    assert not Path("outputs").exists()


def test_the_kept_pictures_are_bounded():
    now = 0.0
    kept = KeptPictures(seconds=10, most_bytes=5, clock=lambda: now)
    first, second = kept.put(b"abc", "image/png"), kept.put(b"def", "image/png")
    assert kept.get(first) is None, "the oldest goes when there is no room"
    assert kept.get(second) == ("image/png", b"def")
    now = 11.0
    assert (kept.get(second), kept.bytes) == (None, 0)


def test_a_signal_while_it_is_composed_leaves_no_folder(tmp_path, monkeypatch):
    from zimage_runner.serve.__main__ import _ends_at_once

    directory = tmp_path / "new/er"
    directory.mkdir(parents=True)
    monkeypatch.setattr(zimage_runner.cli.main, "begun", [(directory, tmp_path)])
    monkeypatch.setattr(os, "_exit", lambda code: (_ for _ in ()).throw(SystemExit(code)))
    with _ends_at_once(), pytest.raises(SystemExit):
        os.kill(os.getpid(), signal.SIGTERM)
    assert list(tmp_path.iterdir()) == []
