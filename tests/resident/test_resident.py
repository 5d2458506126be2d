"""``executor=resident`` leaves and says what ``executor=inline`` does, and goes on whichever side is killed."""

from __future__ import annotations

import json
import os
import re
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import zimage_runner as zr
from tests.support.command import command
from tests.support.controlnets import write_controlnet
from tests.support.resident_place import SMALL, Place

TIMES = re.compile(r"\d+\.\d+ (s|GB|images/s)\b")
OF_ITS_TIME = (
    "timings", "seconds", "per_second", "written", "crc32", "finished_at", "created", "time", "gpu_memory", "phases",
)  # fmt: skip
"""Parts of names. crc32 is of the ledger's line."""


def without_times(value: Any) -> Any:
    """JSON without what no two runs have in common."""
    if isinstance(value, dict):
        return {
            name: without_times(inner)
            for name, inner in value.items()
            if not any(word in name for word in OF_ITS_TIME) and name not in ("peak_host_gb", "run_dir", "directory")
        }
    return [without_times(inner) for inner in value] if isinstance(value, list) else value


def said(text: str, directory: Path) -> list[str]:
    """Lines without times and without the name of the run's folder."""
    text = TIMES.sub("N", text.replace(str(directory), "RUN").replace("mine", "again"))
    return [line.rstrip() for line in re.split(r"[\r\n]+", text) if line.strip() and "|" not in line]


def left(directory: Path) -> dict[str, Any]:
    """What a run has left in its directory, name by name; records in an order of their own: they come as writers do."""
    found: dict[str, Any] = {}
    for path in sorted(directory.rglob("*")):
        name = path.relative_to(directory).as_posix()
        if path.suffix == ".json":
            found[name] = without_times(json.loads(path.read_bytes()))
        elif path.suffix == ".jsonl":
            records = [without_times(json.loads(line)) for line in path.read_bytes().splitlines()]
            found[name] = sorted(records, key=json.dumps)
        elif path.is_file():
            found[name] = None
    return found


def logged(directory: Path) -> list[str]:
    """What run.log says, without numbers and without the name of the run's folder."""
    text = (directory / "run.log").read_text(encoding="utf-8").replace(str(directory), "RUN")
    return [" ".join(re.sub(r"\d+", "N", line).split()) for line in text.replace("mine", "again").splitlines()]


def pixels(directory: Path) -> dict[str, bytes]:
    return {p.parent.parent.name + p.parent.name: Image.open(p).tobytes() for p in directory.rglob("image.png")}


def lines(directory: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (directory / "records.jsonl").read_bytes().splitlines()]


def pictures(directory: Path) -> int:
    return len(list(directory.glob("items/*/*/record.json")))


def inline(place: Place, *words: str) -> tuple[int, str, str]:
    """The same command with executor=inline, in this process."""
    return command(place.folder, *SMALL, "executor=inline", *words)


def test_it_says_and_leaves_what_inline_does(place: Place) -> None:
    words = ["prompts.texts=[a cat,一只猫]", "seeds=[1,2]"]
    mine, other, again = (place.folder / name for name in ("mine", "other", "again"))
    assert place.draw(*words, f"hydra.run.dir={mine}")[0] == 0
    code, out, err = place.draw(*words, f"hydra.run.dir={again}", "name=again")
    expected = inline(place, *words, f"hydra.run.dir={other}", "name=again")
    assert (code, said(out, again)) == (0, ["RUN"])
    assert (expected[0], said(expected[1], other)) == (0, ["RUN"])
    assert said(err, again) == said(expected[2], other)
    here, there = left(again), left(other)
    assert here == there
    assert pixels(again) == pixels(other)
    assert len(pixels(again)) == 4
    assert logged(again) == logged(other)


@pytest.mark.parametrize(
    "words",
    [
        ["model=nano"],
        ["prompt="],
        ["sampling.height=7"],
        ["prompts=text_file", "prompts.path=nowhere.txt"],
        ["executor.nothing=1"],
        ["memory.alloc_conf=x:1"],
    ],
)
def test_what_is_refused_is_refused_in_the_same_words(place: Place, words: list[str]) -> None:
    code, out, err = place.draw(*words)
    expected = inline(place, *words)
    assert (code, out) == expected[:2] == (2, "")
    assert err == expected[2]
    assert not (place.folder / "outputs").exists() or not any((place.folder / "outputs").rglob("records.jsonl"))


def test_prompts_come_through_standard_input_and_jobs_from_a_multirun(place: Place) -> None:
    code, _, err = place.draw("prompts=stdin", "hydra.run.dir=typed", input="a fox\na dog\n")
    assert code == 0, err
    assert pictures(place.folder / "typed") == 2
    code, _, err = place.draw("-m", "prompt=a fox", "seeds=1,2", "hydra.sweep.dir=sweep")
    assert code == 0, err
    assert [pictures(place.folder / "sweep" / job) for job in "01"] == [1, 1]
    assert "job" in err


def begin(place: Place, directory: Path, seeds: str = "0-1999") -> Any:
    """A command whose run has its first pictures, and many more to draw."""
    process = place.start(*SMALL, "executor=resident", "prompt=a cat", f"seeds={seeds}", f"hydra.run.dir={directory}")
    place.wait_for(lambda: pictures(directory) >= 2, process)
    return process


def test_the_first_signal_finishes_what_is_in_flight_and_the_model_stays(place: Place) -> None:
    before = place.warm()
    directory = place.folder / "stopped"
    process = begin(place, directory)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert "SIGINT: finishing the pictures in flight; once more to exit at once" in err
    assert pictures(directory) == len(lines(directory)) >= 2
    assert json.loads((directory / "summary.json").read_bytes())["stopped"] == "SIGINT"
    assert place.pid() == before


def test_a_command_that_is_killed_leaves_a_run_to_be_resumed(place: Place) -> None:
    before = place.warm()
    directory = place.folder / "killed"
    process = begin(place, directory)
    process.kill()
    process.communicate()
    place.wait_for(lambda: (directory / "summary.json").exists())
    done = pictures(directory)
    assert done == len(lines(directory))
    # The run says itself that it is the resident process' to finish.
    process = place.start(f"resume={directory}")
    place.wait_for(lambda: pictures(directory) > done, process)
    process.send_signal(signal.SIGTERM)
    assert "SIGTERM: finishing the pictures in flight" in process.communicate(timeout=60)[1]
    assert process.returncode == 130
    assert [line["seed"] for line in lines(directory)] == list(range(pictures(directory)))
    assert place.pid() == before


def test_a_second_command_waits_and_says_so(place: Place) -> None:
    first = begin(place, place.folder / "long")
    second = place.start(*SMALL, "executor=resident", "prompt=a dog", "hydra.run.dir=after")
    third = place.start(*SMALL, "executor=resident", "prompt=a dog", "hydra.run.dir=never")
    for process in (second, third):
        assert process.stderr is not None
        said = process.stderr.readline()
        assert said == "zimage_runner: executor=resident: waiting for the end of another command's run\n"
    third.send_signal(signal.SIGINT)
    assert third.communicate(timeout=60) == ("", "zimage_runner: stopped by SIGINT\n")
    assert third.returncode == 130
    assert not (place.folder / "after").exists()
    first.send_signal(signal.SIGTERM)
    assert first.wait(60) == 130
    assert second.wait(60) == 0
    assert pictures(place.folder / "after") == 1
    assert not (place.folder / "never").exists()
    for process in (first, second):
        process.communicate()


def test_a_controlnet_swaps_the_session_and_pictures_are_inline_s(place: Place) -> None:
    before = place.warm()
    write_controlnet(place.folder / "net.safetensors", "2.1")
    picture = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(picture).save(place.folder / "picture.png")
    files = ["model.controlnet=net.safetensors", "sampling.control_image=picture.png", "sampling.image=picture.png"]
    words = ["prompt=a cat", *files, "sampling.outpaint=16"]
    code, _, err = place.draw(*words, "hydra.run.dir=pictures")
    assert code == 0, err
    assert "executor=resident: zimage_nano is loaded anew, for other settings\n" in err
    code, _, err = place.draw(*words, "seeds=[1,2]", "hydra.run.dir=pictures2")
    assert "loaded anew" not in err
    assert place.pid() == before
    code, _, err = inline(place, *words, "seeds=[1,2]", "hydra.run.dir=pictures3")
    assert code == 0, err
    assert pixels(place.folder / "pictures2") == pixels(place.folder / "pictures3")
    assert len(pixels(place.folder / "pictures3")) == 2


def test_another_process_goes_on_with_the_run_of_one_that_was_killed(place: Place) -> None:
    before = place.warm()
    directory = place.folder / "lost"
    process = begin(place, directory, "0-59")
    os.kill(before, signal.SIGKILL)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert "executor=resident: the process died; another one goes on with the run" in err
    assert sorted(line["seed"] for line in lines(directory) if line["status"] == "ok") == list(range(60))
    assert place.pid() not in (None, before)


def test_it_takes_over_the_folder_and_leaves_for_another_environment(place: Place, tmp_path: Path) -> None:
    before = place.warm()
    code, out, err = place.draw("prompt=a cat", "name=elsewhere", cwd=tmp_path, environment={"COLUMNS": "77"})
    assert code == 0, err
    assert Path(out.strip()).is_relative_to(tmp_path)
    assert place.pid() == before
    code, _, err = place.draw("model=nano", environment={"HF_HOME": str(tmp_path)})
    assert code == 2
    assert err.splitlines()[0] == (
        "zimage_runner: executor=resident: the process at hand leaves (it differs in $HF_HOME); another one is started"
    )
    assert place.pid() not in (None, before)
    place.run("resident", "stop")  # it is of no use to the next test


def test_it_ends_when_it_is_told_to_or_is_idle(place: Place) -> None:
    pid = place.warm()
    code, out, _ = place.run("resident", "stop")
    assert (code, out) == (0, f"process {pid} has ended\n")
    assert place.run("resident", "status")[1] == "no resident process\n"
    code, _, err = place.draw("prompt=a cat", "executor.idle_minutes=0", "hydra.run.dir=once")
    assert code == 0, err
    place.wait_for(lambda: place.pid() is None)


@pytest.mark.parametrize("words", [[], ["status", "now"], ["restart"]])
def test_another_word_is_refused(place: Place, words: list[str]) -> None:
    code, out, err = place.run("resident", *words)
    assert (code, out) == (2, "")
    assert (
        err
        == f"zimage_runner: resident{''.join(f' {word}' for word in words)}: use resident status, or resident stop\n"
    )


def test_python_is_told_that_it_is_of_the_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(zr.UserError, match="executor=resident is of the command line"):
        zr.run(*SMALL, "executor=resident", prompt="a cat")
    assert not list(tmp_path.rglob("records.jsonl"))
    with pytest.raises(zr.UserError, match=r"executor\.idle_minutes=-1.*out of range"):
        zr.run(*SMALL, "executor=resident", "executor.idle_minutes=-1", prompt="a cat")
