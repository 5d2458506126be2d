"""Prompt files are data, configs are data, model directories are data: nothing of them runs or escapes."""

from __future__ import annotations

import json
import pickle
import shutil
from pathlib import Path

import pytest
import torch

from tests.support.faulty_session import FaultySession, picture
from zimage_runner.outputs.metadata import read_metadata

NASTY = [
    "../../../etc/passwd",
    "/etc/passwd",
    "..",
    ".",
    "~/x",
    "C:\\Windows\\system32",
    "CON",
    "nul.txt",
    "-rf *",
    "$(touch pwned)",
    "`touch pwned`; touch pwned",
    "${oc.env:HOME}",
    "a\u202egnp.exe",
    "a\u2066\u2069\u200b\ufeffb",
    "bell \x07 escape \x1b[2J\x1b]0;title\x07 delete \x7f",
    "line one\nNegative prompt: line two\nSteps: 1, Seed: 666",
    "paragraph\u2028\u2029\x85end",
    '=HYPERLINK("http://evil","x")',
    "@SUM(1+1)*cmd|' /C calc'!A0",
    "<script>alert(1)</script><img src=x onerror=alert(1)>",
    "'; DROP TABLE items; --",
    "👩‍👩‍👧‍👦 🏳️‍🌈 e\u0301 ﷽",
    "猫" * 3000,
    "{__import__('os').system('touch pwned')}",
    "%s %n %x {0} {a.__class__}",
    "!!python/object/apply:os.system ['touch pwned']",
]


@pytest.fixture
def instant(monkeypatch: pytest.MonkeyPatch):
    """Runs of this process draw instantly."""
    from zimage_runner.runner import pool as warm

    monkeypatch.setattr(warm, "Session", FaultySession)
    monkeypatch.delenv("FAULTS", raising=False)


def write_jsonl(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def everything_below(folder: Path) -> set[str]:
    return {str(p.relative_to(folder)) for p in folder.rglob("*")}


@pytest.mark.parametrize("field", ["prompt", "id"])
def test_any_text_stays_text(cli, instant, tmp_path, field):
    if field == "prompt":
        rows: list[dict] = [{"prompt": text} for text in NASTY]
    else:
        rows = [{"prompt": f"picture {n}", "id": text[:256]} for n, text in enumerate(NASTY)]
    file = write_jsonl(tmp_path / "prompts.jsonl", rows)
    code, out, err = cli("prompts=jsonl", f"prompts.path={file}", "seeds=[1]", "hydra.run.dir=run", "warmup=none")
    assert code == 0, err
    assert everything_below(tmp_path) == {"prompts.jsonl", "run"} | {
        f"run/{name}" for name in everything_below(tmp_path / "run")
    }
    records = [json.loads(line) for line in (tmp_path / "run/records.jsonl").read_text(encoding="utf-8").splitlines()]
    assert len(records) == len(rows)
    for record in records:
        folder = tmp_path / "run" / record["item"]
        assert folder.parent.parent == tmp_path / "run" / "items"
        assert record["item"].isprintable()
        full = json.loads((folder / "record.json").read_bytes())
        wanted = rows[full["index"]]
        assert full["prompt"] == wanted["prompt"].strip()
        assert full.get("id") == wanted.get("id")
        recipe = read_metadata(folder / "image.png").recipe
        assert recipe is not None
        assert recipe["prompt"] == full["prompt"]
        assert (picture(full["prompt"], 1, 128, 128) == _pixels(folder)).all()
    assert all(c.isprintable() or c == "\n" for c in out + err)


def _pixels(folder: Path):
    import numpy as np
    from PIL import Image

    return np.asarray(Image.open(folder / "image.png"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a\0b", "prompts.jsonl:2: the prompt holds a NUL character"),
        ("x" * 1_000_000, "prompts.jsonl:2: the prompt has 1,000,000 characters"),
        ("half \ud83d", "prompts.jsonl:2: the prompt holds half of a surrogate pair"),
    ],
)
def test_what_no_file_can_hold_is_refused_with_its_line(cli, instant, tmp_path, text, message):
    file = write_jsonl(tmp_path / "prompts.jsonl", [{"prompt": "fine"}, {"prompt": text}])
    code, _, err = cli("prompts=jsonl", f"prompts.path={file}")
    assert code == 2
    assert message in err
    assert len(err.splitlines()) == 1
    assert len(err) < 600


def test_control_characters_do_not_reach_the_terminal(cli, tmp_path):
    code, _, err = cli(f"prompts.path={tmp_path}/\x1b[31m\u202e.txt", "prompts=text_file")
    assert code == 2
    assert all(c.isprintable() or c == "\n" for c in err)


@pytest.mark.parametrize(
    "yaml",
    [
        "name: !!python/object/apply:os.system ['touch pwned']\n",
        "name: !!python/name:os.system\n",
        "prompts:\n  texts: !!python/object/new:subprocess.Popen [[touch, pwned]]\n",
        "output:\n  _target_: os.system\n  command: touch pwned\n",
        "model:\n  _target_: builtins.exec\n",
        "name: ${eval:__import__('os').system('touch pwned')}\n",
        "a: &a [x,x]\nb: &b [*a,*a]\n",
    ],
)
def test_yaml_runs_no_code(cli, instant, tmp_path, yaml):
    folder = tmp_path / "my_conf" / "experiment"
    folder.mkdir(parents=True)
    (folder / "mine.yaml").write_text("# @package _global_\n" + yaml, encoding="utf-8")
    code, _, err = cli("--config-dir", str(tmp_path / "my_conf"), "+experiment=mine")
    assert code == 2
    assert len(err.splitlines()) == 1
    assert "Traceback" not in err
    assert not list(tmp_path.rglob("pwned"))


def test_a_run_directory_from_elsewhere_runs_no_code(cli, instant, tmp_path):
    code, _, _ = cli("prompt=a cat", "hydra.run.dir=run", "warmup=none")
    assert code == 0
    (tmp_path / "run/records.jsonl").unlink()
    for name in ("overrides.yaml", "config.yaml", "hydra.yaml"):
        path = tmp_path / "run/.hydra" / name
        good = path.read_text(encoding="utf-8")
        path.write_text("!!python/object/apply:os.system ['touch pwned']\n", encoding="utf-8")
        code, _, err = cli("resume=run")
        assert code == 2
        assert len(err.splitlines()) == 1
        assert "Traceback" not in err
        path.write_text(good, encoding="utf-8")
    assert not list(tmp_path.rglob("pwned"))


class Evil:
    """Runs a command when it is unpickled."""

    def __reduce__(self):
        return (Path("pwned").touch, ())


@pytest.fixture
def model(nano: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(nano, tmp_path / "model"))


def test_pickled_weights_are_refused(cli, model, tmp_path):
    weights = model / "transformer" / "diffusion_pytorch_model.safetensors"
    weights.unlink()
    torch.save({"x": Evil()}, weights.with_suffix(".bin"))
    assert pickle.PROTO in weights.with_suffix(".bin").read_bytes()
    code, _, err = cli("model=local", f"model.path={model}", "prompt=a cat")
    assert code == 2
    assert len(err.splitlines()) == 1
    assert "safetensors" in err
    assert not list(tmp_path.rglob("pwned"))


def test_a_pickle_that_calls_itself_safetensors_is_refused(cli, model, tmp_path):
    torch.save({"x": Evil()}, model / "vae" / "diffusion_pytorch_model.safetensors")
    code, _, err = cli("model=local", f"model.path={model}", "prompt=a cat")
    assert code == 2
    assert "diffusion_pytorch_model.safetensors" in err
    assert len(err.splitlines()) == 1
    assert not list(tmp_path.rglob("pwned"))


@pytest.mark.parametrize("engine", ["diffusers", "native"])
@pytest.mark.parametrize("where", ["model_index.json", "transformer/config.json", "text_encoder/config.json"])
def test_code_in_a_model_directory_is_not_run(cli, model, tmp_path, engine, where):
    """Custom components and auto_map are how hubs ask for a directory's own code to be run."""
    for folder in (model, model / "transformer", model / "text_encoder"):
        (folder / "evil.py").write_text(
            "from pathlib import Path\nPath('pwned').touch()\nclass Evil: pass\n", encoding="utf-8"
        )
    config = json.loads((model / where).read_text(encoding="utf-8"))
    if where == "model_index.json":
        config["transformer"] = ["evil", "Evil"]
        config["_class_name"] = ["evil", "Evil"]
    else:
        config["auto_map"] = {"AutoModel": "evil.Evil", "AutoConfig": "evil.Evil"}
    (model / where).write_text(json.dumps(config), encoding="utf-8")
    code, _, err = cli(
        "model=local", f"model.path={model}", f"engine={engine}", "prompt=a cat", "warmup=none",
        "sampling.num_inference_steps=1", "sampling.height=128", "sampling.width=128",
    )  # fmt: skip
    assert code in (0, 2), err
    assert "Traceback" not in err
    assert not list(tmp_path.rglob("pwned"))
