"""The runner from Python: what docs/python.md says."""

from __future__ import annotations

import ast
import json
import re
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
from hydra import compose, initialize_config_dir
from PIL import Image

import zimage_runner as zr
from zimage_runner.api import _as_words
from zimage_runner.outputs.metadata import read_metadata

PAGE = Path(__file__).parent.parent / "docs" / "python.md"
SMALL = {"height": 128, "width": 128, "num_inference_steps": 2}


@pytest.fixture(autouse=True)
def _own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_the_page_does_what_it_says(capsys):
    argv, handler = list(sys.argv), signal.getsignal(signal.SIGINT)
    names: dict[str, object] = {}
    for block in re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.S):
        exec(block, names)
    lines = capsys.readouterr().out.splitlines()
    assert lines[:4] == [f"{what} {seed} (128, 128)" for what in ("a red apple", "a blue cup") for seed in (1, 2)]
    done = names["done"]
    assert isinstance(done, zr.Run)
    assert done.exit_code == 0
    assert done.directory is not None
    assert done.summary["items"]["ok"] == len(done.items) > 0
    assert all(item.ok and item.image and item.image.is_file() and item.record()["seed"] == 0 for item in done.items)
    recipe = read_metadata(Path("apple.png")).recipe
    assert recipe is not None
    assert (recipe["prompt"], recipe["seed"]) == ("a red apple", 1)
    assert (sys.argv, signal.getsignal(signal.SIGINT)) == (argv, handler)


def test_the_notebook_runs_from_top_to_bottom():
    """Cell by cell in one namespace, as a kernel does; kept without outputs."""
    book = json.loads((PAGE.parent / "notebook.ipynb").read_text(encoding="utf-8"))
    assert (book["nbformat"], len({cell["id"] for cell in book["cells"]})) == (4, len(book["cells"]))
    names: dict[str, Any] = {}
    shown = {}
    for cell in (cell for cell in book["cells"] if cell["cell_type"] == "code"):
        assert (cell["outputs"], cell["execution_count"]) == ([], None)
        tree = ast.parse("".join(cell["source"]))
        last = tree.body.pop() if isinstance(tree.body[-1], ast.Expr) else None
        exec(compile(tree, cell["id"], "exec"), names)
        if isinstance(last, ast.Expr):
            shown[cell["id"]] = eval(compile(ast.Expression(last.value), cell["id"], "eval"), names)
    assert {name: shown[name].size for name in ("draw", "steps", "run")} == {
        "draw": (384, 256), "steps": (512, 128), "run": (256, 256),
    }  # fmt: skip
    assert (shown["record"]["prompt"], shown["record"]["seed"]) == ("a red apple", 1)
    assert read_metadata(Path("apple.png")).recipe is not None
    assert names["done"].summary["items"]["ok"] == 4
    assert [item.record()["seed"] for item in names["done"].items] == [0, 1, 0, 1]
    with pytest.raises(zr.UserError, match="closed"):
        names["z"].generate("a cat")


def test_the_same_picture_as_in_a_run_also_from_threads():
    done = zr.run(model="zimage_nano", prompt="a cat", seeds=[3], sampling=SMALL)
    assert done.items[0].image is not None
    expected = np.asarray(Image.open(done.items[0].image))
    found: list[np.ndarray] = []
    with zr.load(model="zimage_nano") as z:

        def draw() -> None:
            found.append(np.asarray(z.generate("a cat", seeds=3, **SMALL)[0].image))

        threads = [threading.Thread(target=draw) for _ in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert len(found) == 2
    assert all((picture == expected).all() for picture in found)
    with pytest.raises(zr.UserError, match="closed"):
        z.generate("a cat")


def test_a_run_in_a_thread_and_a_multirun():
    runs: list[zr.Run] = []
    words = ["-m", "model=zimage_nano", "prompt=a cat", "seeds=1,2", "sampling.height=128", "sampling.width=128"]
    thread = threading.Thread(target=lambda: runs.append(zr.run(*words, "sampling.num_inference_steps=1")))
    thread.start()
    thread.join()
    (done,) = runs
    assert done.exit_code == 0
    assert [job.summary["items"]["ok"] for job in done.jobs] == [1, 1]
    assert [item.record()["seed"] for item in done.items] == [1, 2]
    assert done.directory == done.jobs[0].directory.parent  # pyright: ignore[reportOptionalMemberAccess]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"seeds": "0-3", "prompt": "a, b"}, ["seeds=0-3", "prompt=a, b"]),
        ({"seeds": range(2), "dry_run": True, "resume": None}, ["seeds=[0,1]", "dry_run=true", "resume=null"]),
        ({"seeds": {"count": 2, "derive": "prompt"}}, ['seeds={count:2,derive:"prompt"}']),
        ({"sampling": {"height": 64, "guidance_scale": 0.5}}, ["sampling.height=64", "sampling.guidance_scale=0.5"]),
        ({"prompts": {"texts": ["a, b", "it's"]}}, ['prompts.texts=["a, b","it\'s"]']),
        ({"output_file": Path("a b.png")}, ["output_file=a b.png"]),
    ],
)
def test_keywords_are_words_of_the_command_line(options, words):
    assert _as_words(options) == words


def test_a_keyword_of_another_kind_is_refused():
    with pytest.raises(zr.UserError, match="is a object: give text, numbers"):
        _as_words({"seeds": [object()]})


def test_prompts_of_any_letters_arrive_as_they_are():
    texts = ["a, b = {c} (d)", 'it\'s [e] "f" \\\\ g', "一只猫, true"]
    done = zr.run(
        model="zimage_nano", prompts={"texts": texts}, seeds=[0], sampling={**SMALL, "num_inference_steps": 1}
    )
    assert [item.record()["prompt"] for item in done.items] == texts


def test_a_program_that_uses_hydra_itself_keeps_its_own(tmp_path: Path):
    (tmp_path / "mine.yaml").write_text("a: 1", encoding="utf-8")
    with initialize_config_dir(version_base="1.3", config_dir=str(tmp_path)):
        assert zr.run("model=zimage_nano", prompt="a cat", dry_run=True).exit_code == 0
        with zr.load(model="zimage_nano"):
            assert compose("mine").a == 1


def test_a_dry_run_leaves_nothing():
    assert zr.run("model=zimage_nano", prompt="a cat", dry_run=True) == zr.Run(0, None)
    assert not Path("outputs").exists()


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: zr.run("sampling.height=x", prompt="a"), r"sampling\.height=x: not a whole number"),
        (lambda: zr.run(model="no_such", prompt="a"), "model=no_such: no such option"),
        (lambda: zr.load(model="no_such"), "model=no_such: no such option"),
        (lambda: zr.load("sampling.height=17"), r"sampling\.height=17"),
        (lambda: zr.load(prompt="a"), "prompt=a is of a whole run"),
        (lambda: zr.load("-m"), "-m is of a whole run"),
        (lambda: zr.load(model="zimage_nano").generate("a", heigth=128), "heigth=128: no such field of sampling"),
        (lambda: zr.load(model="zimage_nano").generate("a", height="128"), "height='128': give int"),
        (lambda: zr.load(model="zimage_nano").generate([]), r"prompts\.texts is empty"),
        (lambda: zr.load(model="zimage_nano").generate("a", seeds="x"), "seeds"),
        (lambda: zr.load(model="zimage_nano").generate("a", seeds=cast("Any", 0.5)), "seeds=0.5 is not a seed list"),
        *(
            (lambda p=prompts: zr.load(model="zimage_nano").generate(cast("Any", p)), f"{said}: a prompt is a text")
            for prompts, said in (([3], "3 is a int"), (None, "None is a NoneType"), ({"a": 1}, "{'a': 1} is a dict"))
        ),
        *(
            (lambda words=words: zr.run(*words), f"{words[-1]} is for a terminal, and draws nothing: type zimage-run")
            for words in (["--help"], ["prompt=a", "-h"], ["--vers"], ["-sc"], ["--shell-completion"], ["--hydra-help"])
        ),
    ],
)
def test_what_is_wrong_is_an_exception(call, said):
    with pytest.raises(zr.UserError, match=said):
        call()
    assert not Path("outputs").exists()


def test_a_picture_is_saved_as_its_suffix_says():
    with zr.load(model="zimage_nano") as z:
        (picture,) = z.generate("a cat", seeds=1, **SMALL)
    for suffix, format in ((".jpg", "JPEG"), (".webp", "WEBP"), (".png", "PNG")):
        picture.save(f"cat{suffix}")
        assert Image.open(f"cat{suffix}").format == format
    with pytest.raises(zr.UserError, match=r"name a \.png, \.jpg or \.webp file"):
        picture.save("cat.gif")


def test_importing_it_imports_nothing_heavy():
    code = (
        "import sys, zimage_runner as zr; assert zr.__version__ and 'load' in dir(zr)\n"
        "assert not hasattr(zr, 'nonsense')\n"
        "assert len([m for m in sys.modules if m.startswith('zimage_runner')]) == 1\n"
        "zr.load; assert not {'torch', 'hydra', 'PIL', 'numpy'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
