"""report.html at the end of runs and multiruns: written when something is new, never an error of the run."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.command import SMALL
from zimage_runner.outputs.config import Output

pytestmark = pytest.mark.usefixtures("model_stays")
Cli = Callable[..., tuple[int, str, str]]
RUN = ["seeds=[1,2]", "sampling.num_inference_steps=1", "warmup=none", *SMALL]


def drawn(answer: tuple[int, str, str]) -> Path:
    code, out, err = answer
    assert code == 0, err
    return Path(out.strip().splitlines()[-1])


def test_a_run_leaves_one_page_made_without_reading_its_pictures(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("zimage_runner.view.report.shrunk", lambda *_: pytest.fail("a picture was read again"))
    run = drawn(cli("prompt=a red <b>apple", *RUN))
    page = (run / "report.html").read_text(encoding="utf-8")
    assert page.count('src="data:image/jpeg;base64,') == 2
    assert "a red &lt;b&gt;apple" in page
    assert "finished" in page
    before = (run / "report.html").stat().st_mtime_ns
    drawn(cli("resume=latest"))
    assert (run / "report.html").stat().st_mtime_ns == before

    monkeypatch.undo()
    next(run.glob("items/*/seed_2/image.png")).unlink()
    (run / "report.html").unlink()
    drawn(cli(f"resume={run}"))
    assert (run / "report.html").read_text(encoding="utf-8").count("<img") == 2


def test_one_of_a_multirun_holds_all_its_jobs(cli: Cli) -> None:
    sweep = drawn(cli("-m", "prompt=a red apple", *RUN, "sampling.guidance_scale=0,2"))
    assert (sweep / "report.html").read_text(encoding="utf-8").count("<img") == 4
    assert (sweep / "1" / "report.html").read_text(encoding="utf-8").count("<img") == 2
    before = (sweep / "report.html").stat().st_mtime_ns
    drawn(cli(f"resume={sweep}"))
    assert (sweep / "report.html").stat().st_mtime_ns == before


def test_what_goes_wrong_is_one_warning(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("no room")

    monkeypatch.setattr("zimage_runner.view.report.write_report", broken)
    code, out, err = cli("prompt=a red apple", *RUN)
    assert code == 0
    assert err.count("no room") == 1
    assert not (drawn((code, out, err)) / "report.html").exists()


def test_not_wanted(cli: Cli) -> None:
    assert not (drawn(cli("prompt=a red apple", *RUN, "output.report=false")) / "report.html").exists()


@pytest.mark.parametrize(
    ("report", "pictures", "expected"),
    [(None, 1, True), (None, 2000, True), (None, 2001, False), (True, 10**6, True), (False, 1, False)],
)
def test_large_runs_are_asked_for(report: bool | None, pictures: int, expected: bool) -> None:
    assert Output(report=report).reports(pictures) is expected


def test_time_for_pictures_that_were_drawn_elsewhere_is_bounded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tests.support.made_runs import MadeRun
    from zimage_runner.view import report

    run = MadeRun(tmp_path / "one", ["a cat"], [1, 2, 3]).add_all().finish()
    monkeypatch.setattr(report, "LEAST_SECONDS", 0.0)
    report.write_report(run.folder, 0.0)
    page = (run.folder / "report.html").read_text(encoding="utf-8")
    assert page.count("open the picture") == page.count('href="items/') == 3
    report.write_report(run.folder, stop=lambda: True)
    assert (run.folder / "report.html").read_text(encoding="utf-8").count("open the picture") == 3


def test_starred_pictures_are_prompts_again(cli: Cli, tmp_path: Path) -> None:
    """collect starred=true into=FOLDER, then prompts=jsonl prompts.path=FOLDER/metadata.jsonl."""
    from zimage_runner.collect.__main__ import main
    from zimage_runner.outputs.stars import Stars

    run = drawn(cli("prompt=a red apple", *RUN))
    item = next(run.glob("items/*/seed_2")).relative_to(run)
    (run / "stars.json").write_bytes(Stars(starred={str(item)}).to_json())
    assert main([str(run), f"into={tmp_path}/best", "starred=true"]) == 0
    table = [f"prompts.path={tmp_path}/best/metadata.jsonl", "prompts.columns={seeds: seed}", 'prompts.metadata=["*"]']
    again = drawn(cli("prompts=jsonl", *table, "warmup=none", "name=again", *SMALL))
    (record,) = again.glob("items/*/*/record.json")
    pixels = [
        json.loads(path.read_text(encoding="utf-8"))["pixels_sha256"] for path in (record, run / item / "record.json")
    ]
    assert pixels[0] == pixels[1]
