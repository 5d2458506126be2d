"""Resuming a run: what is drawn again, what is refused, and in whose words."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from tests.support.command import SMALL, command
from zimage_runner.cli.main import remove_unused_directory
from zimage_runner.cli.resume.command_line import find_latest
from zimage_runner.config.paths import CONFIG_DIR
from zimage_runner.errors import UserError

pytestmark = pytest.mark.usefixtures("model_stays")
Cli = Callable[..., tuple[int, str, str]]
PICTURES = CONFIG_DIR / "pictures"
FAST = ["sampling.num_inference_steps=1", "warmup=none", *SMALL]
RUN = ["prompts.texts=['a red apple','一只猫']", "seeds=[1,2]", *FAST]


def run_dir(out: str) -> Path:
    return Path(out.strip().splitlines()[-1])


def first_run(cli: Cli, *more: str) -> Path:
    code, out, err = cli(*RUN, *more)
    assert code == 0, err
    return run_dir(out)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A run of four pictures. Tests work on copies, and none of them may write into what they were copied from."""
    code, out, err = command(tmp_path_factory.mktemp("finished"), *RUN)
    assert code == 0, err
    run = run_dir(out)
    before = state(run)
    yield run
    assert state(run) == before


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    return copied(finished, tmp_path / "outputs" / "default")


def copied(run: Path, parent: Path) -> Path:
    """A copy with the same times, as if the run had been started in that folder."""
    return Path(shutil.copytree(run, parent / run.name))


def state(run: Path) -> dict[str, tuple[int, int]]:
    stats = {str(path): path.stat() for path in run.rglob("*")}
    return {path: (stat.st_size, stat.st_mtime_ns) for path, stat in stats.items()}


def images(run: Path) -> dict[str, bytes]:
    return {str(p.relative_to(run)): p.read_bytes() for p in sorted(run.glob("items/*/*/image.png"))}


def pixels_of(run: Path) -> dict[str, str]:
    records = (json.loads(p.read_text(encoding="utf-8")) for p in run.glob("items/*/*/record.json"))
    return {r["item"]: r["pixels_sha256"] for r in records}


def assert_whole(run: Path, count: int) -> None:
    """Every item once, complete and as its record says."""
    lines = [json.loads(line) for line in (run / "records.jsonl").read_text(encoding="utf-8").splitlines()]
    last = {line["item"]: line for line in lines}
    assert len(last) == count
    for item, line in last.items():
        assert line["status"] == "ok"
        assert hashlib.sha256((run / item / "image.png").read_bytes()).hexdigest() == line["sha256"]
    assert not list(run.rglob("*.tmp"))


def test_deleted_and_truncated_pictures_are_drawn_again(cli: Cli, run: Path) -> None:
    before, pixels = images(run), pixels_of(run)
    names = list(before)
    (run / names[0]).unlink()
    (run / names[1]).write_bytes(before[names[1]][:100])
    kept = (run / names[2]).stat().st_mtime_ns
    code, out, err = cli(f"resume={run}")
    assert code == 0, err
    assert run_dir(out) == run
    assert "2 are damaged and drawn again" in err
    assert_whole(run, 4)
    assert pixels_of(run) == pixels
    assert (run / names[2]).stat().st_mtime_ns == kept
    summary = json.loads((run / "summary.json").read_text(encoding="utf-8"))
    assert (summary["items"]["ok"], summary["items"]["done_before"]) == (2, 2)


def test_verify_finds_changed_bytes(cli: Cli, run: Path) -> None:
    name, data = next(iter(images(run).items()))
    (run / name).write_bytes(data[:-20] + bytes(20))
    code, _, _ = cli(f"resume={run}")
    assert code == 0
    assert (run / name).read_bytes() != data, "without verify=true only sizes are compared"
    code, _, err = cli(f"resume={run}", "verify=true")
    assert code == 0
    assert "its bytes changed" in err
    assert_whole(run, 4)


def test_a_torn_ledger_line_is_no_trouble(cli: Cli, run: Path) -> None:
    ledger = run / "records.jsonl"
    ledger.write_bytes(ledger.read_bytes()[:-40])
    code, _, err = cli(f"resume={run}")
    assert code == 0, err
    assert_whole(run, 4)


def test_nothing_to_do_loads_no_model(cli: Cli, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("zimage_runner.runner.pool.SharedExecutor.lease", lambda *_: pytest.fail("it was loaded"))
    code, out, err = cli("resume=latest")
    assert code == 0
    assert run_dir(out) == run
    assert "nothing to draw: 4 pictures are done" in err


def test_the_source_may_be_gone(cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_text("a red apple --d 3\n一只猫\n", encoding="utf-8")
    options = [*FAST, "seeds=[1,2]"]
    code, out, err = cli("prompts=text_file", "prompts.path=p.txt", *options)
    assert code == 0, err
    run = run_dir(out)
    (tmp_path / "p.txt").unlink()
    next(run.glob("items/*/seed_3/image.png")).unlink()
    code, _, err = cli(f"resume={run}")
    assert code == 0, err
    assert_whole(run, 3)


def test_harmless_settings_may_change(cli: Cli, run: Path) -> None:
    next(run.glob("items/*/*/image.png")).unlink()
    others = ("engine.batch_size=2", "engine.threads=2", "output.png_compress_level=9", "output.fsync=never")
    code, _, err = cli(f"resume={run}", *others)
    assert code == 0, err
    assert_whole(run, 4)


OTHER_PICTURES = {
    "sampling.num_inference_steps=2": "sampling.num_inference_steps was 1, now 2",
    "seeds=[1,2,3]": "seeds was [1, 2], now [1, 2, 3]",
    "prompts.texts=['x']": "prompts.texts was ['a red apple', '一只猫'], now ['x']",
    "model.dtype=bfloat16": "model.dtype was 'auto', now 'bfloat16'",
    "engine.noise_device=cuda": "engine.noise_device was 'cpu', now 'cuda'",
}


def test_settings_that_change_pictures_are_refused(cli: Cli, run: Path) -> None:
    before = images(run)
    for override, expected in OTHER_PICTURES.items():
        code, _, err = cli(f"resume={run}", override)
        assert code == 2
        assert expected in err
        assert len(err.strip().splitlines()) == 1
    code, _, err = cli(f"resume={run}", *OTHER_PICTURES)
    assert all(expected in err for expected in OTHER_PICTURES.values())
    assert images(run) == before


@pytest.mark.parametrize("seeds", ["1-2", "'1-2'", "[1,2]", "[1-2]"])
def test_the_same_seeds_in_other_words_are_the_same(cli: Cli, run: Path, seeds: str) -> None:
    next(run.glob("items/*/*/image.png")).unlink()
    code, _, err = cli(f"resume={run}", f"seeds={seeds}")
    assert code == 0, err
    assert_whole(run, 4)


def test_a_run_is_not_renamed(cli: Cli, run: Path) -> None:
    code, _, err = cli(f"resume={run}", "name=foo")
    assert code == 2
    assert err == f"zimage_runner: resume={run}: name=foo cannot rename a run, and it was begun as run: leave it out\n"
    assert cli(f"resume={run}", "name=run")[0] == 0


def test_pictures_of_another_kind_are_refused(cli: Cli, run: Path) -> None:
    """The config is the same, but what was drawn says otherwise: another machine, dtype or engine."""
    ledger = run / "records.jsonl"
    lines = [json.loads(line) for line in ledger.read_text(encoding="utf-8").splitlines()]
    for line in lines:
        line["fingerprint"] = "0" * 64
        del line["crc32"]
    ledger.write_text("".join(json.dumps(line, separators=(",", ":")) + "\n" for line in lines[:-1]), encoding="utf-8")
    record = run / lines[0]["item"] / "record.json"
    changed = json.loads(record.read_text(encoding="utf-8"))
    changed["numerics"]["dtype"] = "bfloat16"
    record.write_text(json.dumps(changed), encoding="utf-8")
    code, _, err = cli(f"resume={run}")
    assert code == 2
    assert "dtype was bfloat16, now float32" in err


def test_a_picture_may_lie_elsewhere(cli: Cli) -> None:
    shutil.copy(PICTURES / "cat.png", "cat.png")
    shutil.copy(PICTURES / "boat.png", "boat.png")
    run = first_run(cli, "sampling.image=cat.png", "sampling.strength=1")
    before = pixels_of(run)
    Path("cat.png").rename("moved.png")
    code, _, err = cli(f"resume={run}", "sampling.image=boat.png")
    assert code == 2
    assert "sampling.image was 'cat.png', now 'boat.png'" in err
    shutil.rmtree(next(run.glob("items/*")))
    code, _, err = cli(f"resume={run}", "sampling.image=moved.png")
    assert code == 0, err
    assert_whole(run, 4)
    assert pixels_of(run) == before


def test_retry_failed_leaves_missing_items_alone(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    from zimage_runner.session import Session

    real = Session.generate

    def failing(self, items, **options):
        if any(item.seed == 2 for item in items):
            raise RuntimeError("no luck")
        return real(self, items, **options)

    monkeypatch.setattr(Session, "generate", failing)
    code, out, err = cli(*RUN)
    assert code == 1, err
    run = run_dir(out)
    monkeypatch.setattr(Session, "generate", real)
    ledger = run / "records.jsonl"
    done = [
        line
        for line in ledger.read_text(encoding="utf-8").splitlines()
        if '"seed":1' not in line or '"index":0' not in line
    ]
    ledger.write_text("\n".join(done) + "\n", encoding="utf-8")  # item 0, seed 1 is missing now
    code, _, err = cli(f"resume={run}", "retry=failed")
    assert code == 130, "an item is still missing"
    last = {
        json.loads(line)["item"]: json.loads(line)["status"] for line in ledger.read_text(encoding="utf-8").splitlines()
    }
    assert sorted(last.values()) == ["ok", "ok", "ok"]
    code, _, err = cli(f"resume={run}")
    assert code == 0, err
    assert_whole(run, 4)


def test_retry_failed_leaves_damaged_items_alone(cli: Cli, run: Path) -> None:
    lost = next(run.glob("items/*"))
    shutil.rmtree(lost)
    for more in ([], ["verify=true"]):
        code, _, err = cli(f"resume={run}", "retry=failed", *more)
        assert code == 130
        assert "nothing to draw: 2 pictures are done, 2 are damaged and not asked for (retry=failed)" in err
        assert not lost.exists()
    code, _, err = cli(f"resume={run}")
    assert code == 0, err
    assert_whole(run, 4)


def test_dry_run_of_a_resume_tells_what_is_left(cli: Cli, run: Path) -> None:
    next(run.glob("items/*/*/image.png")).unlink()
    before = sorted(p for p in run.rglob("*"))
    code, out, err = cli(f"resume={run}", "dry_run=true")
    assert code == 0, err
    assert "4 pictures of 2 prompts; 3 are done, 1 remains" in out
    assert re.search(r"prompts to encode +1\n", out)
    assert sorted(p for p in run.rglob("*")) == before


def test_a_job_of_a_multirun_is_resumed_by_itself(cli: Cli) -> None:
    code, out, err = cli("-m", "prompt=a red apple", "seeds=[1,2],[3,4]", *RUN[2:])
    assert code == 0, err
    sweep = run_dir(out)
    pixels = pixels_of(sweep / "1")
    next(sweep.glob("1/items/*/seed_3/image.png")).unlink()
    code, _, err = cli(f"resume={sweep}/1")
    assert code == 0, err
    assert_whole(sweep / "1", 2)
    assert pixels_of(sweep / "1") == pixels


class TestWholeMultirun:
    @pytest.fixture(scope="class")
    def finished_sweep(self, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
        folder = tmp_path_factory.mktemp("finished_sweep")
        code, out, err = command(folder, "-m", "prompt='a red, apple','一只猫'", "seeds=[1,2],[3,4]", *RUN[2:])
        assert code == 0, err
        sweep = run_dir(out)
        before = state(sweep)
        yield sweep
        assert state(sweep) == before

    @pytest.fixture
    def sweep(self, finished_sweep: Path, tmp_path: Path) -> Path:
        return copied(finished_sweep, tmp_path / "outputs" / "multirun" / "default")

    def damage(self, sweep: Path) -> None:
        """Four jobs: untouched, one picture short, never begun, begun but without any picture."""
        next(sweep.glob("1/items/*/seed_3/image.png")).unlink()
        shutil.rmtree(sweep / "2")
        shutil.rmtree(sweep / "3/items")
        (sweep / "3/records.jsonl").unlink()

    def test_every_job_is_finished_as_it_began(self, cli: Cli, sweep: Path) -> None:
        pixels = {n: pixels_of(sweep / str(n)) for n in range(4)}
        kept = {path: path.stat().st_mtime_ns for path in sweep.glob("0/items/*/*/image.png")}
        self.damage(sweep)
        code, out, err = cli(f"resume={sweep}", "verify=true")
        assert code == 0, err
        assert out.splitlines() == [*(str(sweep / str(n)) for n in range(4)), str(sweep)]
        for n in range(4):
            assert_whole(sweep / str(n), 2)
            assert pixels_of(sweep / str(n)) == pixels[n]
        assert {path: path.stat().st_mtime_ns for path in kept} == kept
        assert "job 1 is continued" in err
        assert "job 2 was never begun: it starts now" in err
        assert (sweep / "summary.csv").read_text(encoding="utf-8").count(",complete,2,0,") == 4
        code, _, err = cli(f"resume={sweep}")  # the sweep's file was written anew meanwhile
        assert (code, err.count("nothing to draw: 2 pictures are done")) == (0, 4)

    def test_a_dry_run_changes_nothing(self, cli: Cli, sweep: Path) -> None:
        self.damage(sweep)
        before = state(sweep)
        code, out, err = cli(f"resume={sweep}", "dry_run=true")
        assert code == 0, err
        assert "2 pictures of 1 prompt; 1 is done, 1 remains" in out
        assert out.endswith("4 jobs, 5 pictures to draw in all\n")
        assert [line for line in err.splitlines() if not line.startswith("resume=")] == []
        changed = {path for path, _ in set(state(sweep).items()) ^ set(before.items())}
        assert changed <= {str(sweep / "multirun.yaml")}  # Hydra's own

    def test_failed_items_alone(self, cli: Cli, sweep: Path) -> None:
        self.damage(sweep)
        code, _, err = cli(f"resume={sweep}", "retry=failed")
        assert code == 130  # there is more to draw than was asked for
        assert "job 2 was never begun and left alone (retry=failed)" in err
        assert not (sweep / "2").exists()

    def test_harmless_settings_may_change_and_others_are_refused_job_by_job(self, cli: Cli, sweep: Path) -> None:
        next(sweep.glob("1/items/*/seed_3/image.png")).unlink()
        code, _, err = cli("-m", f"resume={sweep}", "engine.batch_size=2", "sampling.num_inference_steps=2")
        assert code == 2
        told = "sampling.num_inference_steps=2 would mix other pictures into the run: sampling.num_inference_steps was"
        assert err.count(f"{told} 1, now 2: leave it out") == 4
        code, _, err = cli(f"resume={sweep}", "engine.batch_size=2")
        assert code == 0, err
        assert_whole(sweep / "1", 2)

    def test_a_sweeper_that_chooses_as_it_goes_is_refused(self, cli: Cli, sweep: Path) -> None:
        text = (sweep / ".hydra/multirun.yaml").read_text(encoding="utf-8")
        (sweep / ".hydra/multirun.yaml").write_text(
            text.replace("basic_sweeper.BasicSweeper", "optuna.OptunaSweeper"), encoding="utf-8"
        )
        code, _, err = cli(f"resume={sweep}")
        assert code == 2
        assert "its jobs were chosen by OptunaSweeper" in err
        (sweep / ".hydra/multirun.yaml").write_text("hydra: {}", encoding="utf-8")
        code, _, err = cli(f"resume={sweep}")
        assert code == 2
        assert "multirun.yaml has no sweeper: resume its jobs one by one" in err


class TestLatest:
    """Whatever was started last is what is resumed."""

    def begin(self, root: Path, name: str, order: int, job: int | None = None, sweeper: str = "BasicSweeper") -> Path:
        """A run, or a job of a multirun, as far as what it left tells when it was started."""
        run = root / name / "now" if job is None else root / "multirun" / name / "now" / str(job)
        files = {run / ".hydra/overrides.yaml": "[]", run / ".hydra/hydra.yaml": "{}"}
        if job is not None and not (run.parent / "multirun.yaml").exists():
            files[run.parent / "multirun.yaml"] = (
                f"hydra: {{sweeper: {{_target_: x.{sweeper}}}, runtime: {{}}, overrides: {{task: [], hydra: []}}}}"
            )
        for path, text in files.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
            os.utime(path, (order, order))
        return run

    @given(st.lists(st.tuples(st.sampled_from("abc"), st.none() | st.integers(0, 2)), min_size=1, unique=True))
    def test_any_order_of_starts(self, starts: list[tuple[str, int | None]]) -> None:
        with tempfile.TemporaryDirectory() as folder:
            for order, (name, job) in enumerate(starts, start=1):
                last = self.begin(Path(folder), name, order, job)
            assert find_latest(Path(folder)) == (last if starts[-1][1] is None else last.parent)

    def test_an_interrupted_multirun_is_finished_whole(self, cli: Cli) -> None:
        first_run(cli, "name=older")
        code, out, err = cli("-m", "prompt='a red, apple','一只猫'", "seeds=[1,2],[3]", *RUN[2:])
        assert code == 0, err
        sweep = run_dir(out)
        next(sweep.glob("1/items/*/*/image.png")).unlink()
        shutil.rmtree(sweep / "3")
        cli("-m", "prompt=a", "seeds=[1,2],[3]", "dry_run=true", "name=planned")
        code, out, err = cli("resume=latest")
        assert code == 0, err
        assert run_dir(out) == sweep
        assert f"resume=latest: the whole multirun {sweep} (3 of its jobs were begun)" in err.splitlines()
        assert_whole(sweep / "1", 1)
        assert_whole(sweep / "3", 1)
        newer = first_run(cli, "name=newer")
        code, out, _ = cli("resume=latest")
        assert (code, run_dir(out)) == (0, newer)

    @pytest.mark.parametrize(
        "refused",
        [
            ["sampling.num_inference_steps=two,4"],
            ["sampling.width=100,200"],
            ["sampling.width=100,200", "continue=elsewhere/all"],
            ["sampling.width=64,128", "dry_run=true"],
        ],
    )
    def test_a_multirun_that_began_no_job_leaves_nothing(self, cli: Cli, tmp_path: Path, refused: list[str]) -> None:
        earlier = self.begin(tmp_path / "outputs", "a", 1)
        Path("elsewhere").mkdir()
        before = state(tmp_path).keys()
        code, _, err = cli("-m", "prompt=a", "model=zimage_nano", "model.native_sizes=[]", *refused)
        assert code == (0 if "dry_run=true" in refused else 2)
        assert len(set(err.splitlines())) == len(err.splitlines()), "each refusal is told once"
        assert err.count("sampling.width=100 is not") == (1 if "width=100" in refused[0] else 0)
        assert state(tmp_path).keys() == before
        self.begin(tmp_path / "outputs", "later", 2, 0)
        shutil.rmtree(tmp_path / "outputs/multirun/later/now/0")  # of another version, or killed before
        assert find_latest(tmp_path / "outputs") == earlier

    def test_a_multirun_that_cannot_be_resumed_gives_its_last_job_and_says_so(
        self, tmp_path: Path, capfd: pytest.CaptureFixture[str]
    ) -> None:
        self.begin(tmp_path, "s", 1, 0, "OptunaSweeper")
        last = self.begin(tmp_path, "s", 3, 1)
        self.begin(tmp_path, "s", 2, 2)
        assert find_latest(tmp_path) == last
        assert f"only the last job, {last}, because" in capfd.readouterr().err
        assert find_latest(tmp_path, resumes=False) == last.parent, "other commands take it whole, and say nothing"
        with pytest.raises(UserError, match=r"^latest: there is no run in"):
            find_latest(tmp_path / "multirun", resumes=False)
        assert capfd.readouterr().err == ""


def test_the_options_of_the_first_run_are_named(cli: Cli) -> None:
    """So that another default since then changes nothing."""
    from zimage_runner.cli.resume.command_line import resume_command_line

    run = first_run(cli, "memory=staged")
    argv = resume_command_line([f"resume={run}", "warmup=generate"])
    assert {"engine=auto", "memory=staged", "model=zimage_nano", "sampling=default", "warmup=generate"} <= set(argv)
    assert not {"warmup=none", "experiment=null"} & set(argv)
    assert argv.count("memory=staged") == 1


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["resume=nowhere"], "nowhere is not a directory: give the run directory"),
        (["resume=latest"], "resume=latest: there is no run in"),
        (["resume=."], "holds no run (no .hydra/overrides.yaml in it)"),
        (["resume="], "resume='' is empty: give a run directory, or resume=latest"),
        (["-m", "resume=x"], "resume cannot be combined with --multirun"),
        (["retry=failed", "prompt=a"], "retry=failed needs resume=RUN_DIRECTORY"),
        (["verify=true", "prompt=a"], "verify=true needs resume=RUN_DIRECTORY"),
        (["skip_existing=nowhere", "prompt=a"], "skip_existing=nowhere holds no earlier run"),
        (["skip_existing=", "prompt=a"], "skip_existing='' is empty: name a run or the folder of runs"),
    ],
)
def test_bad_requests(cli: Cli, argv: list[str], expected: str) -> None:
    code, _, err = cli(*argv)
    assert code == 2
    assert expected in err
    assert len(err.strip().splitlines()) == 1
    assert not [path for path in Path().rglob("*") if path.name == "records.jsonl"], "nothing was begun"


def test_what_is_near_a_run_is_no_run(cli: Cli, run: Path) -> None:
    for near, expected in (
        (run.parent, f"holds no run (no .hydra/overrides.yaml in it): give .* printed; the newest below it is {run}"),
        (run / "summary.json", "is not a directory: give the run directory"),
    ):
        code, _, err = cli(f"resume={near}")
        assert code == 2
        assert all(part in err for part in expected.split(" .* "))
        assert len(err.splitlines()) == 1


def test_a_prompt_that_stood_for_an_experiments(cli: Cli) -> None:
    argv = ["+experiment=quickstart", "seeds=1", "sampling.num_inference_steps=1", *SMALL]
    code, out, err = cli(*argv, "prompt=a fox")
    assert code == 0, err
    (picture,) = (run_dir(out)).glob("items/00000_a_fox/seed_1/image.png")
    pixels = picture.read_bytes()
    picture.unlink()
    code, _, err = cli("resume=latest")
    assert code == 0, err
    assert picture.read_bytes() == pixels
    code, out, err = cli("-m", *argv, "prompt='a fox','a dog'")
    assert code == 0, err
    pictures = sorted(run_dir(out).glob("*/items/*/*/image.png"))
    assert [path.parents[1].name for path in pictures] == ["00000_a_fox", "00000_a_dog"]
    shutil.rmtree(pictures[1].parents[4] / "1")
    assert cli("resume=latest")[0] == 0
    assert pictures[1].is_file()


class TestGivenAgain:
    """The whole command line once more, as a scheduler gives it, or another one."""

    QUICK = ("+experiment=quickstart", "prompts.limit=1", "seeds=1", "sampling.num_inference_steps=1", "warmup=none")

    def test_an_experiment_is_given_as_its_fields_are(self, cli: Cli) -> None:
        code, out, err = cli(*self.QUICK, "continue=runs/all")
        assert code == 0, err
        for argv, expected in (
            (self.QUICK, ("nothing to draw: 1 picture is done",)),
            (("+experiment=[quickstart]",), ("nothing to draw: 1 picture is done",)),
            ((*self.QUICK[1:], "+experiment=img2img"), ("prompts.path was not there, now '", "was None, now True")),
            (("+experiment=turbo",), ("seeds was 1, now [42]", "model.name was 'zimage_nano', now 'zimage_turbo'")),
        ):
            code, _, err = cli(*argv, "continue=runs/all")
            assert code == (0 if "nothing" in expected[0] else 2), err
            assert all(part in err for part in expected), err
            assert len(err.splitlines()) == 1
        next(run_dir(out).glob("items/*/*/image.png")).unlink()
        code, _, err = cli("resume=runs/all", "+experiment=img2img")
        assert code == 2
        assert "+experiment=img2img would mix other pictures into the run" in err

    def test_an_experiment_of_harmless_settings_wins_over_the_run(self, cli: Cli, run: Path) -> None:
        Path("c/experiment").mkdir(parents=True)
        file = Path("c/experiment/speed.yaml")
        file.write_text("# @package _global_\nengine: {batch_size: 2}\noutput: {fsync: never}\n", encoding="utf-8")
        for picture in run.glob("items/*/*/image.png"):
            picture.unlink()
        code, _, err = cli(f"resume={run}", "--config-dir=c", "+experiment=speed")
        assert code == 0, err
        assert all(
            json.loads(p.read_text(encoding="utf-8"))["batch_size"] == 2 for p in run.glob("items/*/*/record.json")
        )
        file.write_text("# @package _global_\nseeds: [3]\n", encoding="utf-8")
        code, _, err = cli(f"resume={run}", "--config-dir=c", "+experiment=speed")
        assert code == 2
        assert "+experiment=speed would mix other pictures into the run: seeds was [1, 2], now [3]" in err

    def test_an_experiment_that_was_edited_is_refused(self, cli: Cli) -> None:
        Path("c/experiment").mkdir(parents=True)
        file = Path("c/experiment/mine.yaml")
        file.write_text("# @package _global_\nprompt: a cat\n", encoding="utf-8")
        argv = ("--config-dir=c", "+experiment=mine", *FAST, "continue=runs/mine")
        assert cli(*argv)[0] == 0
        assert cli(*argv)[0] == 0
        file.write_text("# @package _global_\nprompt: a dog\n", encoding="utf-8")
        code, _, err = cli(*argv)
        assert code == 2
        assert "prompt was 'a cat', now 'a dog'" in err

    def test_a_choice_that_an_experiment_makes_anew_is_not_passed_over(self, cli: Cli) -> None:
        Path("c/experiment").mkdir(parents=True)
        file, head = Path("c/experiment/x.yaml"), "# @package _global_\n"
        argv = ("--config-dir=c", "+experiment=x", *FAST, "continue=runs/all")
        file.write_text(f"{head}defaults: [{{override /memory: resident}}]\nprompt: a cat\n", encoding="utf-8")
        assert cli(*argv)[0] == 0
        assert cli(*argv)[0] == 0
        file.write_text(f"{head}defaults: [{{override /memory: staged}}]\nprompt: a cat\n", encoding="utf-8")
        code, _, err = cli(*argv)
        assert code == 2
        assert "the experiment chooses memory=staged now, and the run was begun with memory=resident: put that" in err
        assert cli(*argv, "memory=staged")[0] == 0

    def test_a_prompt_of_an_experiment_replaces_the_file_that_it_builds_on(self, cli: Cli) -> None:
        Path("c/experiment").mkdir(parents=True)
        Path("p.txt").write_text("a cat\n", encoding="utf-8")
        head = "# @package _global_\n"
        for name, text in (
            ("file", "defaults: [{override /prompts: text_file}]\nprompts: {path: p.txt}\nseeds: [1]\n"),
            ("text", "defaults: [file]\nprompt: a green boat\n"),
            ("list", "prompts: {texts: [a green boat]}\nseeds: [1]\n"),
        ):
            Path(f"c/experiment/{name}.yaml").write_text(head + text, encoding="utf-8")
        assert cli("--config-dir=c", "+experiment=file", *FAST, "continue=runs/all")[0] == 0
        code, _, err = cli("--config-dir=c", "+experiment=text", *FAST, "continue=runs/all")
        assert code == 2
        assert "+experiment=text would mix other pictures into the run" in err
        assert "prompt was None, now 'a green boat'" in err
        assert "prompts.path was 'p.txt', now not there" in err
        assert cli("prompt=a cat", "seeds=[1]", *FAST, "continue=runs/one")[0] == 0
        code, _, err = cli("--config-dir=c", "+experiment=list", *FAST, "continue=runs/one")
        assert code == 2
        assert "prompt was 'a cat', now None; prompts.texts was [], now ['a green boat']: leave it out" in err

    def test_a_multirun_that_was_refused_is_begun_in_its_folder_once_it_is_mended(self, cli: Cli) -> None:
        Path("mine").mkdir()
        code, _, err = cli("-m", "prompt=a cat", "seeds=-1,-2", *FAST, "continue=mine")
        assert (code, list(Path("mine").iterdir())) == (2, []), err
        Path("photos/2024").mkdir(parents=True)
        code, _, err = cli("-m", "prompt=a cat", "seeds=-1,-2", *FAST, "hydra.sweep.dir=photos")
        assert (code, list(Path("photos").rglob("*"))) == (2, [Path("photos/2024")]), err
        code, _, err = cli("-m", "prompt=a cat", "seeds=1,2", *FAST, "hydra.sweep.dir=photos")
        assert code == 0, "a folder of the user's is no job"
        code, _, err = cli("-m", "prompt=a cat", "seeds=1,2", *FAST, "continue=mine")
        assert code == 0, err
        shutil.rmtree("mine/1")
        code, _, err = cli("-m", "prompt=a cat", "seeds='1-1','2-2'", *FAST, "continue=mine")
        assert code == 0, err
        assert len(list(Path("mine").glob("*/items/*/*/image.png"))) == 2

    def test_a_multirun_that_a_signal_ends_before_its_first_job_leaves_nothing(
        self, cli: Cli, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def stopped(*_: object) -> None:
            assert Path("runs/all/multirun.yaml").is_file()
            remove_unused_directory()
            raise KeyboardInterrupt

        monkeypatch.setattr("zimage_runner.cli.sweep.launcher.keep_jobs", stopped)
        assert cli("-m", "prompt=a cat", "seeds=1,2", *FAST, "continue=runs/all")[0] == 130
        assert not Path("runs").exists()

    def test_a_multirun_of_a_config_of_ones_own_is_resumed_as_it_says(self, cli: Cli) -> None:
        Path("c").mkdir()
        Path("c/own.yaml").write_text("defaults: [config, _self_]\nprompt: a cat\n", encoding="utf-8")
        code, _, err = cli("--config-dir=c", "--config-name=own", "-m", "seeds=1,2", *FAST, "hydra.sweep.dir=sw")
        assert code == 0, err
        shutil.rmtree("sw/1")
        code, _, err = cli("resume=sw")
        assert code == 0, err
        assert Path("sw/1/items/00000_a_cat/seed_2/image.png").is_file()

    def test_prompts_that_are_others_now_are_refused(self, cli: Cli) -> None:
        file = Path("p.txt")
        file.write_text("a cat\n一只猫\n", encoding="utf-8")
        argv = ("prompts=text_file", "prompts.path=p.txt", *FAST, "continue=runs/all")
        assert cli(*argv)[0] == 0
        file.write_text("\na cat\n一只猫\n", encoding="utf-8")
        assert cli(*argv)[0] == 0, "the same prompts on other lines"
        file.write_text("a cat\n一只猫\na dog\n", encoding="utf-8")
        code, _, err = cli(*argv)
        assert code == 2
        assert "p.txt has other prompts than the run began with (2 then, 3 now; the first that differs is num" in err
        assert cli("resume=runs/all")[0] == 0
        file.unlink()
        assert cli(*argv)[0] == 0, "the run has its own"

    def test_files_of_prompts_are_the_same_under_another_pattern(self, cli: Cli) -> None:
        for name, text in {"p/a": "a cat", "p/b": "a dog", "q/a": "a cat", "q/b": "a fox", "r/a": "--width x"}.items():
            Path(name).parent.mkdir(exist_ok=True)
            Path(f"{name}.txt").write_text(f"{text}\n", encoding="utf-8")
        argv = ("prompts=files", *FAST, "continue=runs/all")
        assert cli("prompts.glob=p/*.txt", *argv)[0] == 0
        for pattern in ("./p/*.txt", Path("p/*.txt").absolute()):
            code, _, err = cli(f"prompts.glob={pattern}", *argv)
            assert code == 0, err
            assert "nothing to draw: 2 pictures are done" in err
        for pattern, told in {
            "q/*.txt": "q/*.txt has other prompts than the run began with (2 then, 2 now; the first that differs",
            "gone/*.txt": "prompts.glob was 'p/*.txt', now 'gone/*.txt'",
            "r/*.txt": "r/a.txt:1",
        }.items():
            code, _, err = cli(f"prompts.glob={pattern}", *argv)
            assert code == 2
            assert told in err

    def test_a_file_of_prompts_is_the_same_under_another_path(self, cli: Cli) -> None:
        Path("p.txt").write_text("a cat\n", encoding="utf-8")
        Path("link.txt").symlink_to("p.txt")
        Path("other.txt").write_text("a dog\n", encoding="utf-8")
        argv = ("prompts=text_file", *FAST, "continue=runs/all")
        assert cli("prompts.path=p.txt", *argv)[0] == 0
        for path in ("./p.txt", Path("p.txt").absolute(), "link.txt"):
            code, _, err = cli(f"prompts.path={path}", *argv)
            assert code == 0, err
            assert "nothing to draw: 1 picture is done" in err
        code, _, err = cli("prompts.path=other.txt", *argv)
        assert code == 2
        assert "other.txt has other prompts than the run began with (1 then, 1 now" in err
        code, _, err = cli("prompts.path=gone.txt", *argv)
        assert code == 2
        assert "prompts.path was 'p.txt', now 'gone.txt'" in err
        argv = ("-m", "prompts=text_file", "seeds=1,2", *FAST, "continue=runs/several")
        assert cli("prompts.path=p.txt", *argv)[0] == 0
        shutil.rmtree("runs/several/1")
        code, _, err = cli("prompts.path=other.txt", *argv)
        assert code == 2
        assert "job 1 was never begun" in err
        assert "prompts.path was 'p.txt', now 'other.txt'" in err
        code, _, err = cli("prompts.path=link.txt", *argv)
        assert code == 0, err
        assert Path("runs/several/1/items/00000_a_cat/seed_2/image.png").is_file()

    @pytest.mark.parametrize(("row", "goes_on"), [({"image": "x.png", "strength": 0.5}, False), ({}, True)])
    def test_a_file_of_prompts_that_names_pictures_is_another_one_beside_others(
        self, cli: Cli, row: dict[str, object], goes_on: bool
    ) -> None:
        for folder in ("a", "b"):
            Path(folder).mkdir()
            Path(folder, "p.jsonl").write_text(json.dumps({"prompt": "a cat", **row}), encoding="utf-8")
            Image.new("RGB", (128, 128), "red" if folder == "a" else "blue").save(f"{folder}/x.png")
        argv = ("-m", "prompts=jsonl", "seeds=1,2", *FAST, "continue=runs/all")
        assert cli("prompts.path=a/p.jsonl", *argv)[0] == 0
        shutil.rmtree("runs/all/1")
        code, _, err = cli("prompts.path=b/p.jsonl", *argv)
        assert (code, "prompts.path was 'a/p.jsonl', now 'b/p.jsonl'" in err) == ((0, False) if goes_on else (2, True))
        assert Path("runs/all/1").exists() == goes_on

    @pytest.mark.parametrize(
        ("name", "expected"),
        [
            (
                "outputs/default",
                "is no run, but a folder of 1 run: continue=outputs/default/{run} goes on with the last",
            ),
            ("mine", "is no run, and holds other things (all): name a new folder; continue=mine/2 begins one in it"),
            (
                "none/../mine",
                "is no run, and holds other things (all): name a new folder; continue=none/../mine/2 begins",
            ),
            ("mine/note.txt", "is no folder: give the one that the run is, or shall be, in"),
        ],
    )
    @pytest.mark.parametrize("more", [[], ["-m"]])
    def test_a_folder_that_is_no_runs_is_refused(
        self, cli: Cli, run: Path, tmp_path: Path, name: str, expected: str, more: list[str]
    ) -> None:
        Path("mine/all").mkdir(parents=True)
        Path("mine/note.txt").write_text("mine", encoding="utf-8")
        before = state(tmp_path)
        code, _, err = cli(*RUN, *more, f"continue={name}")
        assert code == 2
        assert f"continue={name} {expected.format(run=run.name)}" in err
        assert err.count("\n") == 1
        assert state(tmp_path) == before
        Path("new/.git").mkdir(parents=True)
        assert cli(*RUN, *more, "continue=new", "dry_run=true")[0] == 0

    def test_a_multirun_of_experiments(self, cli: Cli) -> None:
        Path("c/experiment").mkdir(parents=True)
        for name in "ab":
            text = f"# @package _global_\nname: {name}\nprompt: {name}\n"
            Path(f"c/experiment/{name}.yaml").write_text(text, encoding="utf-8")
        argv = ("-m", "--config-dir=c", *FAST, "+experiment=a,b", "continue=runs/all")
        assert cli(*argv)[0] == 0
        shutil.rmtree("runs/all/1")
        code, _, err = cli(*argv)
        assert code == 0, err
        assert "nothing to draw: 1 picture is done" in err
        assert_whole(Path("runs/all/1"), 1)
        code, _, err = cli("resume=runs/all", "+experiment=quickstart")
        assert code == 2
        assert "+experiment=quickstart would mix other pictures into the run: prompt was 'a', now None" in err


class TestNeverTwice:
    @pytest.fixture
    def earlier(self, finished: Path, tmp_path: Path) -> Path:
        return copied(finished, tmp_path / "outputs" / "earlier")

    def test_pictures_of_earlier_runs_are_linked(self, cli: Cli, earlier: Path) -> None:
        more = ["prompts.texts=['a dog','一只猫']", "seeds=[2,3]", *FAST]
        code, out, err = cli(*more, "skip_existing=outputs/earlier", "name=later")
        assert code == 0, err
        later = run_dir(out)
        assert_whole(later, 4)
        same = next(earlier.glob("items/00001*/seed_2/image.png")), next(later.glob("items/00001*/seed_2/image.png"))
        assert same[0].samefile(same[1])
        summary = json.loads((later / "summary.json").read_text(encoding="utf-8"))
        assert (summary["items"]["ok"], summary["items"]["linked"]) == (3, 1)
        record = json.loads((same[1].parent / "record.json").read_text(encoding="utf-8"))
        assert record["reused_from"] == str(same[0].parent.absolute())

    def test_damaged_pictures_are_not_spread(self, cli: Cli, earlier: Path) -> None:
        for picture in earlier.glob("items/*/*/image.png"):
            picture.write_bytes(bytes(picture.stat().st_size))
        code, out, err = cli(*RUN, "skip_existing=outputs/earlier", "name=later")
        assert code == 0, err
        assert_whole(run_dir(out), 4)
        assert json.loads((run_dir(out) / "summary.json").read_text(encoding="utf-8"))["items"]["linked"] == 0

    def test_the_same_picture_of_two_prompts_is_drawn_once(self, cli: Cli) -> None:
        code, out, err = cli("prompts.texts=['a cat','a cat']", "seeds=[1,2]", *RUN[2:])
        assert code == 0, err
        run = run_dir(out)
        assert_whole(run, 4)
        summary = json.loads((run / "summary.json").read_text(encoding="utf-8"))
        assert (summary["items"]["ok"], summary["items"]["linked"]) == (2, 2)


@pytest.mark.parametrize(
    "name", [".hydra", ".hydra/overrides.yaml", ".hydra/hydra.yaml", "prompts.jsonl", "records.jsonl"]
)
@pytest.mark.parametrize("more", [["dry_run=true"], []])
def test_a_link_in_the_run_is_not_followed(cli: Cli, run: Path, tmp_path: Path, name: str, more: list[str]) -> None:
    (run / name).rename(tmp_path / "elsewhere")
    (run / name).symlink_to(tmp_path / "elsewhere")
    code, _, err = cli(f"resume={run}", *more)
    assert code == 2
    assert f"{name} is a link: put a plain file or folder there, or remove it" in err
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("link", "expected"), [("0", "0 is a link: put the job's own folder there"), ("multirun.yaml", "holds no run")]
)
def test_a_link_in_a_multirun_is_not_followed(cli: Cli, tmp_path: Path, link: str, expected: str) -> None:
    """Hydra writes multirun.yaml anew when a multirun is resumed, and jobs draw into their folders."""
    sweep = tmp_path / "sweep"
    (sweep / "0").mkdir(parents=True)
    (sweep / "multirun.yaml").write_text("hydra: {}\n", encoding="utf-8")
    (sweep / link).rename(tmp_path / "elsewhere")
    (sweep / link).symlink_to(tmp_path / "elsewhere")
    code, _, err = cli(f"resume={sweep}")
    assert code == 2
    assert expected in err
    assert not (tmp_path / "elsewhere").is_file() or (tmp_path / "elsewhere").read_text() == "hydra: {}\n"


def test_options_of_ones_own_are_kept_with_the_run(cli: Cli) -> None:
    """The folder with the experiment and the model's option may be gone."""
    for name, text in {
        "model/mine": "defaults: [zimage_nano, _self_]\nname: mine\n",
        "experiment/x": "# @package _global_\ndefaults: [{override /model: mine}]\n",
    }.items():
        Path(f"c/{name}.yaml").parent.mkdir(parents=True)
        Path(f"c/{name}.yaml").write_text(text, encoding="utf-8")
    run = first_run(cli, "--config-dir=c", "+experiment=x")
    shutil.rmtree("c")
    next(run.glob("items/*/*/image.png")).unlink()
    code, _, err = cli(f"resume={run}")
    assert code == 0, err
    assert_whole(run, 4)
