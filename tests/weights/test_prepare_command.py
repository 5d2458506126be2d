"""``python -m zimage_runner.prepare``: what it prints and the codes it exits with."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from zimage_runner import logs
from zimage_runner.prepare import main
from zimage_runner.weights.find import hubs


def run(capsys: pytest.CaptureFixture[str], *argv: str) -> tuple[int, str, str]:
    code = main(argv)
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_build_then_verify(capsys: pytest.CaptureFixture[str], sharded: Path, runner_cache: Path) -> None:
    options = ("model=local", f"model.path={sharded}")
    code, out, _ = run(capsys, *options)
    assert code == 0
    assert out.startswith(f"prepared: {runner_cache}/prepared/local-")
    code, out, _ = run(capsys, "verify", *options)
    assert code == 0
    assert out.count("as expected") == 5
    assert "equals the source rounded to bfloat16 (239 tensors" in out
    code, out, _ = run(capsys, "info", *options)
    assert code == 0
    assert f"prepared: {runner_cache}/prepared/local-" in out


def test_verify_finds_an_altered_file_and_accept_takes_it(capsys: pytest.CaptureFixture[str], nano: Path) -> None:
    options = ("model=local", f"model.path={nano}")
    assert run(capsys, "verify", *options)[0] == 0
    file = nano / "vae/diffusion_pytorch_model.safetensors"
    raw = bytearray(file.read_bytes())
    raw[-100_000] ^= 1
    file.write_bytes(raw)
    code, out, _ = run(capsys, "verify", *options)
    assert code == 1
    assert "vae/diffusion_pytorch_model.safetensors: sha256" in out
    assert "ALTERED since its first use on" in out
    assert run(capsys, "accept", *options)[0] == 0
    assert run(capsys, "verify", *options)[0] == 0


def test_info_of_the_default_model(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "info")
    assert code == 0
    assert "assets/zimage_nano" in out
    assert "prepared: none; would be in" in out


@pytest.mark.parametrize("action", ["info", "verify", "accept"])
def test_looking_downloads_nothing(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, action: str
) -> None:
    def fetch(_: object, local_files_only: bool, __: object) -> str:
        assert local_files_only
        raise OSError("nothing is there")

    monkeypatch.setattr(hubs, "_from_modelscope", fetch)
    code, _, err = run(capsys, action, "model=zimage_turbo", f"model.cache_dir={tmp_path}")
    assert code == 2
    assert err.startswith("zimage_runner: Tongyi-MAI/Z-Image-Turbo is not downloaded: a run, or `")


def test_looking_at_half_a_download_says_what_is_missing(
    capsys: pytest.CaptureFixture[str], nano: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hubs, "_from_modelscope", lambda *_: str(nano))
    weights = nano / "vae/diffusion_pytorch_model.safetensors"
    weights.rename(f"{weights}.incomplete")
    code, _, err = run(capsys, "info", "model=zimage_turbo")
    assert code == 2
    assert f"the cached Tongyi-MAI/Z-Image-Turbo in {nano} is incomplete: vae/{weights.name}" in err
    assert "is missing: a run, or `" in err
    assert "offline" not in err


def test_what_is_told_is_json_where_that_is_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    try:
        code, _, err = run(capsys, "model=zimage_turbo", "model.offline=true", "log.format=json")
    finally:
        logs.use_format(logs.LogFormat.text)
    assert code == 2
    assert json.loads(err)["message"].startswith("model.offline=true and Tongyi-MAI/Z-Image-Turbo is not in ModelScope")


def test_help_names_every_action(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "--help")
    assert code == 0
    assert all(word in out for word in ("build", "verify", "download", "accept", "info"))


@pytest.mark.parametrize(
    ("argv", "text"),
    [
        (["repair"], "repair: say one of build, verify, download, accept, info"),
        (["model=nope"], "model=nope: no such option"),
        (["model.nmae=x"], "model.nmae: no such field; did you mean name?"),
        (["model.verify=sometimes"], "model.verify"),
        (["model=local"], "model.path is not set"),
        (["model=local", "model.path=/does/not/exist"], "model.path=/does/not/exist: no such directory"),
        (["download"], "model.source=embedded: nothing to download"),
        (["info", "+model.foo=1"], "foo: no such field of Model, and + cannot add one"),
        (["download", "model=zimage_turbo", "model.offline=true"], "model.offline=true: nothing can be downloaded"),
        (["model=zimage_turbo", "model.offline=true"], "Tongyi-MAI/Z-Image-Turbo is not in ModelScope's cache"),
    ],
)
def test_bad_input_is_one_line(capsys: pytest.CaptureFixture[str], argv: list[str], text: str) -> None:
    code, out, err = run(capsys, *argv)
    assert code == 2
    assert out == ""
    assert text in err
    assert err.startswith("zimage_runner: ")
    assert err.count("\n") == 1


def test_runs_as_a_module(nano: Path) -> None:
    command = [sys.executable, "-m", "zimage_runner.prepare", "info", "model=local", f"model.path={nano}"]
    assert str(nano) in subprocess.check_output(command, text=True, encoding="utf-8")


def test_info_of_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "style.safetensors"
    key = "diffusion_model.layers.0.attention.to_q.lora_"
    save_file({f"{key}A.weight": torch.zeros(8, 3840), f"{key}B.weight": torch.zeros(3840, 8)}, file)
    assert main(["info", str(file)]) == 0
    assert "adapter: LoRA of 1 modules, rank 8" in capsys.readouterr().out
    file.write_bytes(b"<!DOCTYPE html>")
    assert main(["info", str(file)]) == 2
    assert capsys.readouterr().err.count("\n") == 1
