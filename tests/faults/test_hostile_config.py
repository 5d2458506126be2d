"""Run directories and config files of others are data: none of them runs code or reads the environment."""

from __future__ import annotations

import io
import json
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from hydra.experimental.callback import Callback
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from tests.support.command import command
from tests.support.faulty_session import FaultySession
from zimage_runner.cli.foreign import TRUST

CODE = f"{__name__}.pwn"
MINE = ("--config-dir", "theirs", "+experiment=mine")


def pwn(**_: Any) -> Any:
    """What a hostile file wants to be called."""
    Path("pwned").touch()
    return Callback()


@pytest.fixture(autouse=True)
def instant(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs of this process draw instantly."""
    from zimage_runner.runner import pool

    monkeypatch.setattr(pool, "Session", FaultySession)
    monkeypatch.delenv("FAULTS", raising=False)
    monkeypatch.setenv("SECRET", "hunter2")


def write(path: str | Path, text: str) -> Path:
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


def experiment(text: str, header: str = "# @package _global_\n", name: str = "mine") -> None:
    write(f"theirs/experiment/{name}.yaml", header + text)


def assert_nothing_ran() -> None:
    assert not list(Path().rglob("pwned"))


def assert_refused(code: int, out: str, err: str, *parts: str) -> None:
    assert code == 2, err
    assert len(err.splitlines()) == 1, err
    assert all(part in err for part in parts), err
    assert "hunter2" not in out + err
    assert_nothing_ran()


LOGGING = f"version: 1, root: {{handlers: [x]}}, handlers: {{x: {{(): {CODE}}}}}"
EXPERIMENTS = {
    "callback": (f"hydra: {{callbacks: {{x: {{_target_: {CODE}}}}}}}", "hydra.callbacks.x._target_"),
    "our own callback": (f"hydra: {{callbacks: {{sweep_report: {{_target_: {CODE}}}}}}}", "sweep_report._target_"),
    "nested": (f"hydra: {{callbacks: {{sweep_report: {{grid: {{_target_: {CODE}}}}}}}}}", "grid._target_"),
    "launcher": (f"hydra: {{launcher: {{_target_: {CODE}}}}}", "hydra.launcher._target_"),
    "sweeper": (f"hydra: {{sweeper: {{_target_: {CODE}}}}}", "hydra.sweeper._target_"),
    "job_logging": (f"hydra: {{job_logging: {{{LOGGING}}}}}", "hydra.job_logging.version"),
    "hydra_logging": (f"hydra: {{hydra_logging: {{{LOGGING}}}}}", "hydra.hydra_logging.version"),
    "env_set": ("hydra: {job: {env_set: {LD_PRELOAD: /x.so}}}", "hydra.job.env_set.LD_PRELOAD"),
    "env_copy": ("hydra: {job: {env_copy: [SECRET]}}", "hydra.job.env_copy"),
    "output_subdir": ("hydra: {output_subdir: ../x}", "hydra.output_subdir"),
    "sweep of hydra": (f"hydra: {{sweeper: {{params: {{+hydra.callbacks.x._target_: {CODE}}}}}}}", "sweeper.params"),
    "by reference": (
        "prompts: {template: {fill: {a: [b]}}}\nhydra: {callbacks: {sweep_report: {tile: '${prompts.template.fill}'}}}",
        "hydra.callbacks.sweep_report.tile",
    ),
    "created": (
        f"hydra: {{callbacks: {{sweep_report: {{tile: '${{oc.create:\"{{_target_: {CODE}}}\"}}'}}}}}}",
        "hydra.callbacks.sweep_report.tile",
    ),
    "target elsewhere": (f"prompts: {{template: {{fill: {{_target_: [{CODE}]}}}}}}", "prompts.template.fill._target_"),
    "in a list": (f"hydra: {{callbacks: {{x: [{{_target_: {CODE}}}]}}}}", "hydra.callbacks.x.0._target_"),
}


class TestExperiments:
    @pytest.mark.parametrize("name", EXPERIMENTS)
    def test_none_runs_code(self, cli, name: str) -> None:
        text, named = EXPERIMENTS[name]
        experiment(text)
        for words in (("prompt=a cat", "dry_run=true"), ("-m", "prompt=a cat", "seeds=1,2")):
            assert_refused(*cli(*MINE, *words), "theirs/experiment/mine.yaml", named, TRUST)

    @pytest.mark.parametrize("word", ["--cfg=job", "--cfg=hydra", "--info=config", "--hydra-help"])
    def test_nor_when_settings_are_shown(self, cli, word: str) -> None:
        experiment(EXPERIMENTS["hydra_logging"][0])
        assert_refused(*cli(word, *MINE), "hydra.hydra_logging")

    @pytest.mark.parametrize(
        ("header", "text", "named"),
        [
            ("# @package hydra.callbacks.x\n", f"_target_: {CODE}\n", "hydra.callbacks.x._target_"),
            ("# @package hydra.job_logging\n", f"{{{LOGGING}}}\n", "hydra.job_logging.version"),
        ],
    )
    def test_a_package_line_changes_nothing(self, cli, header: str, text: str, named: str) -> None:
        experiment(text, header)
        assert_refused(*cli(*MINE, "prompt=a cat"), named)

    @pytest.mark.parametrize(
        ("default", "file"),
        [
            ("override /hydra/sweeper: evil", "theirs/hydra/sweeper/evil.yaml"),
            ("override /hydra/callbacks: evil", "theirs/hydra/callbacks/evil.yaml"),
            ("/stuff@hydra.callbacks.x: evil", "theirs/stuff/evil.yaml"),
            ("/../evil@hydra.callbacks.x", "evil.yaml"),
            ("/../../evil@hydra.callbacks.x", "evil.yaml"),
        ],
    )
    def test_what_a_defaults_list_reaches(self, cli, default: str, file: str) -> None:
        write(file, f"_target_: {CODE}\n")
        experiment(f"defaults: [{{{default}}}]\n" if ": " in default else f"defaults: [{default}]\n")
        code, out, err = cli("-m", *MINE, "prompt=a cat")
        assert_refused(code, out, err)

    def test_a_launcher_that_lies_beside_an_experiment(self, cli) -> None:
        write("theirs/hydra/launcher/evil.yaml", f"_target_: {CODE}\n")
        assert_refused(*cli("-m", "--config-dir=theirs", "hydra/launcher=evil", "prompt=a"), "hydra.launcher._target_")

    def test_all_of_hydra_by_reference(self, cli) -> None:
        experiment("hydra: ${prompts}\n")
        assert_refused(*cli(*MINE, "prompt=a cat"))

    @pytest.mark.filterwarnings("ignore:.*validated against ConfigStore:UserWarning")
    def test_a_file_named_like_our_own_launcher(self, cli) -> None:
        write("theirs/hydra/launcher/warm.yaml", f"_target_: {CODE}\n")
        assert_refused(*cli("-m", "--config-dir", "theirs", "prompt=a cat"), "warm.yaml", "hydra.launcher._target_")

    def test_a_base_config_of_others_adds_no_search_path(self, cli, monkeypatch, tmp_path) -> None:
        write("base/config.yaml", "hydra: {searchpath: ['pkg://evil']}\n")
        write("evil/__init__.py", "from pathlib import Path\nPath('pwned').touch()\n")
        monkeypatch.syspath_prepend(str(tmp_path))
        assert_refused(*cli("--config-path", str(tmp_path / "base"), "prompt=a cat"), "hydra.searchpath")

    def test_a_package_outside_is_named_outside(self, cli) -> None:
        from zimage_runner.config.paths import CONFIG_DIR

        file = write(Path("far/evil.yaml").absolute(), f"# @package hydra.callbacks.x\n_target_: {CODE}\n")
        up = "../" * (len(CONFIG_DIR.parts) + 1)
        assert_refused(*cli(f"+experiment={up}{file.with_suffix('')}", "prompt=a cat"), "hydra.callbacks.x._target_")

    def test_what_one_trusts_runs(self, cli) -> None:
        """Which shows too that the tests above would see it."""
        experiment(EXPERIMENTS["callback"][0])
        code, _, err = cli(*MINE, TRUST, "prompt=a cat", "dry_run=true")
        assert code == 0, err
        assert Path("pwned").exists()

    @pytest.mark.parametrize("text", ["trust_code: true\n", "--trust-code: true\n"])
    def test_no_file_trusts_itself(self, cli, text: str) -> None:
        experiment(text + EXPERIMENTS["callback"][0])
        assert_refused(*cli(*MINE, "prompt=a cat"), "hydra.callbacks.x._target_")

    def test_data_of_ones_own_works_as_ever(self, cli) -> None:
        experiment(
            "name: ${oc.env:SECRET}\nprompt: a cat\n"
            "hydra: {run: {dir: here}, sweep: {dir: there, subdir: 'j${hydra.job.num}'}, job: {name: mine},"
            " sweeper: {params: {seeds: '1,2'}}, callbacks: {sweep_report: {grid: false, tile: 16}}}\n"
        )
        code, out, err = cli(*MINE, "warmup=none")
        assert (code, Path(out.strip())) == (0, Path("here").absolute()), err
        code, _, err = cli("-m", *MINE, "warmup=none")
        assert code == 0, err
        assert {path.parents[2].name for path in Path("there").glob("*/items/*/*")} == {"j0", "j1"}

    def test_what_is_typed_is_trusted(self, cli) -> None:
        code, _, err = cli("prompt=a cat", "dry_run=true", f"+hydra.callbacks.x._target_={CODE}")
        assert code == 0, err
        assert Path("pwned").exists()


def edit(path: str | Path, change: Any) -> None:
    """Load a YAML file, let ``change`` alter what is in it, and write it back."""
    data = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    change(data)
    Path(path).write_text(yaml.safe_dump(data), encoding="utf-8")


@pytest.fixture(scope="module")
def begun(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A run and a multirun of two pictures each; tests work on copies."""
    from zimage_runner.runner import pool

    words = ("prompt=a cat", "warmup=none", "hydra.callbacks.sweep_report.grid=false")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pool, "Session", FaultySession)
        folder = tmp_path_factory.mktemp("begun")
        for more in (("hydra.run.dir=run", "seeds=[1,2]"), ("-m", "hydra.sweep.dir=sweep", "seeds=1,2")):
            code, _, err = command(folder, *words, *more)
            assert code == 0, err
    return folder / "run", folder / "sweep"


@pytest.fixture
def run(begun: tuple[Path, Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(begun[0], tmp_path / "outputs" / "run" / "now"))


@pytest.fixture
def sweep(begun: tuple[Path, Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(begun[1], tmp_path / "outputs" / "multirun" / "run" / "now"))


OVERRIDES = {
    "callback": f"+hydra.callbacks.x._target_={CODE}",
    "mapping": f"+hydra.callbacks.x={{_target_:{CODE}}}",
    "our callback": f"hydra.callbacks.sweep_report.tile={{_target_:{CODE}}}",
    "by reference": "hydra.callbacks.sweep_report.tile=${prompts.template.fill}",
    "launcher": f"hydra.launcher._target_={CODE}",
    "other launcher": "hydra/launcher=joblib",
    "sweeper": f"hydra.sweeper._target_={CODE}",
    "params": f"+hydra.sweeper.params.hydra/job_logging={CODE}",
    "logging": f"hydra.job_logging={{{LOGGING.replace(': ', ':')}}}",
    "environment": "+hydra.job.env_set.LD_PRELOAD=/x.so",
    "search path": "hydra.searchpath=[pkg://evil]",
    "mode": "hydra.mode=MULTIRUN",
    "package": "+stuff@hydra.callbacks.x=evil",
    "option": "--config-dir=/",
    "flag": "--multirun",
    "no field": "+nothing=1",
}


class TestRunDirectories:
    def test_overrides_of_a_single_run(self, cli, run: Path) -> None:
        next(run.glob("items/*/seed_1/image.png")).unlink()
        edit(run / ".hydra/overrides.yaml", lambda found: found.extend(OVERRIDES.values()))
        for words in ((f"resume={run}", "dry_run=true"), ("resume=latest",)):
            code, _, err = cli(*words)
            assert code == 0, err
            (told,) = [line for line in err.splitlines() if "left out of its saved settings" in line]
            assert all(text.partition("=")[0] in told for text in OVERRIDES.values())
            assert_nothing_ran()
        assert len(list(run.glob("items/*/*/image.png"))) == 2

    @pytest.mark.parametrize("kind", ["task", "hydra"])
    def test_overrides_of_a_multirun(self, cli, sweep: Path, kind: str) -> None:
        for file in ("multirun.yaml", ".hydra/multirun.yaml"):
            edit(sweep / file, lambda found: found["hydra"]["overrides"][kind].extend(OVERRIDES.values()))
        next(sweep.glob("1/items/*/*/image.png")).unlink()
        for words in ((f"resume={sweep}", "dry_run=true"), ("resume=latest",)):
            code, _, err = cli(*words)
            assert code == 0, err
            assert "+hydra.callbacks.x._target_" in err
            assert_nothing_ran()
        assert len(list(sweep.glob("*/items/*/*/image.png"))) == 2

    @pytest.mark.parametrize("subdir", ["/tmp/x", "../x"])
    def test_no_job_leaves_the_multirun(self, cli, sweep: Path, subdir: str) -> None:
        edit(
            sweep / ".hydra/multirun.yaml",
            lambda c: c["hydra"]["overrides"]["hydra"].append(f"hydra.sweep.subdir={subdir}"),
        )
        code, out, err = cli(f"resume={sweep}")
        assert code == 0, err
        assert "left out of its saved settings: hydra.sweep.subdir" in err
        assert out.splitlines() == [str(sweep / "0"), str(sweep / "1"), str(sweep)]

    def test_settings_of_hydra_are_not_taken(self, cli, run: Path, sweep: Path) -> None:
        hydra = {
            "callbacks": {"x": {"_target_": CODE}},
            "launcher": {"_target_": CODE},
            "sweeper": {"_target_": f"{CODE}.BasicSweeper"},
            "job_logging": {"version": 1, "root": {"handlers": ["x"]}, "handlers": {"x": {"()": CODE}}},
            "searchpath": ["pkg://evil"],
        }
        edit(run / ".hydra/hydra.yaml", lambda found: found["hydra"].update(hydra))
        edit(sweep / "0/.hydra/hydra.yaml", lambda found: found["hydra"].update(hydra))
        edit(sweep / ".hydra/multirun.yaml", lambda found: found["hydra"].update(hydra))
        for words in ((f"resume={run}",), (f"resume={sweep}",), (f"resume={sweep}/0",)):
            code, _, err = cli(*words)
            assert code == 0, err
            assert_nothing_ran()

    def name_their_folder(self, directory: Path, option: str, file: str) -> None:
        source = {"provider": "command-line", "schema": "file", "path": str(Path("theirs").absolute())}

        def change(found: dict) -> None:
            found["hydra"]["runtime"]["config_sources"].append(source)
            found["hydra"]["runtime"]["choices"]["sampling"] = "mine"
            found["hydra"]["overrides"]["task"].append(option)

        edit(directory / file, change)

    def test_a_folder_that_a_run_names(self, cli, run: Path, sweep: Path) -> None:
        write("theirs/sampling/mine.yaml", f"# @package hydra.callbacks.x\n_target_: {CODE}\n")
        self.name_their_folder(run, "+experiment=mine", ".hydra/hydra.yaml")
        self.name_their_folder(sweep, "+experiment=mine", ".hydra/multirun.yaml")
        for words in ((f"resume={run}",), (f"resume={run}", "dry_run=true")):
            experiment("name: x\n")
            assert_refused(*cli(*words), "theirs/sampling/mine.yaml", "hydra.callbacks.x._target_")
        # What an experiment chooses is the experiment's in a multirun: the option that the run names is not even read.
        code, _, err = cli(f"resume={sweep}")
        assert code == 0, err
        assert_nothing_ran()
        experiment(f"_target_: {CODE}\n", header="# @package hydra.callbacks.x\n")
        assert_refused(*cli(f"resume={sweep}"), "theirs/experiment/mine.yaml", "hydra.callbacks.x._target_")

    def test_a_folder_that_a_run_names_looks_nothing_up(self, cli, sweep: Path) -> None:
        experiment("prompt: ${oc.env:SECRET}\n")
        write("theirs/sampling/mine.yaml", "defaults: [default]\n")
        self.name_their_folder(sweep, "+experiment=mine", ".hydra/multirun.yaml")
        assert_refused(*cli(f"resume={sweep}"), "theirs/experiment/mine.yaml", "give --config-dir yourself")
        code, _, err = cli(f"resume={sweep}", "--config-dir=theirs", "dry_run=true")
        assert code == 0, err

    @pytest.mark.parametrize(
        "text", ["${oc.env:SECRET}", "${name}${oc.env:SECRET}", "\\${name}${oc.env:SECRET}", "${now:%Y}"]
    )
    def test_nothing_is_looked_up_for_a_saved_config(self, cli, run: Path, text: str) -> None:
        edit(run / ".hydra/config.yaml", lambda found: found.update(prompt=text))
        for words in ((f"resume={run}",), ("resume=latest", "dry_run=true")):
            assert_refused(*cli(*words), ".hydra/config.yaml: prompt=", "write the value there")

    def test_nor_for_saved_overrides(self, cli, run: Path, sweep: Path) -> None:
        edit(run / ".hydra/overrides.yaml", lambda found: found.append("name=${oc.env:SECRET}"))
        code, out, err = cli(f"resume={run}")
        assert code == 0, err
        assert "hunter2" not in out + err
        add = "name=${oc.env:SECRET}"
        edit(sweep / ".hydra/multirun.yaml", lambda found: found["hydra"]["overrides"]["task"].append(add))
        assert_refused(*cli(f"resume={sweep}"), "give name=... on the command line")

    def test_what_the_first_run_looked_up_is_kept(self, cli, monkeypatch) -> None:
        experiment("prompt: a ${oc.env:SECRET}\n")
        code, out, err = cli(*MINE, "warmup=none", "seeds=1")
        assert code == 0, err
        run = Path(out.strip())
        picture = next(run.glob("items/*/*/image.png"))
        before = picture.read_bytes()
        picture.unlink()
        Path("theirs/experiment/mine.yaml").unlink()
        monkeypatch.setenv("SECRET", "another")
        code, _, err = cli(f"resume={run}")
        assert code == 0, err
        assert picture.read_bytes() == before

    def test_an_ordinary_multirun_keeps_its_settings(self, cli, sweep: Path) -> None:
        next(sweep.glob("1/items/*/*/image.png")).unlink()
        code, _, err = cli("resume=latest")
        assert code == 0, err
        assert "left out" not in err
        saved = yaml.safe_load((sweep / "multirun.yaml").read_text(encoding="utf-8"))
        assert "hydra.callbacks.sweep_report.grid=false" in saved["hydra"]["overrides"]["hydra"]


def test_a_picture_is_not_asked_to_look_anything_up() -> None:
    from zimage_runner.reproduce import recipe_config

    secret = "${oc.env:SECRET} \\${x}"
    recipe = {"prompt": secret, "seed": 1, "params": {"negative_prompt": secret}, "model": {}, "numerics": {}}
    config = recipe_config(json.loads(json.dumps(recipe)), [])
    assert (config.prompts.texts, config.sampling.negative_prompt) == ([secret], secret)  # pyright: ignore


def test_what_a_picture_says_cannot_command_the_terminal(tmp_path, capfd) -> None:
    from zimage_runner.reproduce import main

    recipe = {"prompt": "a", "seed": 1, "params": {"guidance_scale": "\x1b[2J"}, "model": {}, "numerics": {}}
    info = PngInfo()
    info.add_text("zimage_runner", json.dumps(recipe))
    Image.new("RGB", (64, 64)).save(tmp_path / "x\x1b[31m.png", pnginfo=info)
    assert main([str(tmp_path / "x\x1b[31m.png"), "model=zimage_nano"]) == 2
    assert "\x1b" not in "".join(capfd.readouterr())


def test_messages_and_logs_show_controls(tmp_path, capfd) -> None:
    from zimage_runner.logs import run_log, say

    said = io.StringIO()
    say("a\x1b[2J\u202e\x9b b\tc\n猫👩‍👩‍👧\u3000", said)
    assert said.getvalue() == "a\\x1b[2J\\u202e\\x9b b\tc\n猫👩‍👩‍👧\u3000\n"
    with run_log(tmp_path / "run.log"):
        logging.getLogger("zimage_runner").info("picture \x1b]0;title\x07")
    assert (tmp_path / "run.log").read_text().endswith("picture \\x1b]0;title\\x07\n")


BOMB = "a0: &a0 [x, x]\n" + "".join(f"a{n}: &a{n} [*a{n - 1}, *a{n - 1}]\n" for n in range(1, 60))


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("prompt: " + "[" * 50_000, "nested more than 100 deep"),
        ("prompt: a\n" + BOMB, "its aliases unfold to too much"),
        ("prompt: !!bool 3", "not readable as YAML"),
        ("prompt: a\n#" + "x" * (32 << 20), "larger than 33,554,432 bytes"),
    ],
)
def test_files_that_a_parser_dies_of_are_refused(cli, text: str, why: str) -> None:
    experiment(text)
    assert_refused(*cli(*MINE, "dry_run=true"), "experiment/mine.yaml", why)


@pytest.mark.parametrize("name", ["config.yaml", "overrides.yaml", "hydra.yaml"])
@pytest.mark.parametrize("text", ["[" * 50_000, BOMB, "a: !!bool 3"])
def test_so_are_those_of_a_saved_run(cli, name: str, text: str) -> None:
    assert cli("prompt=a cat", "hydra.run.dir=run", "warmup=none", "output.min_free_gb=0")[0] == 0
    write(f"run/.hydra/{name}", text)
    assert_refused(*cli("resume=run"), "/run: .hydra/", name)
    assert cli("resume=run", "dry_run=true")[0] == 2
    from zimage_runner.view.status import status_of

    (told,) = status_of(["run"])["runs"]
    assert (told["done"], told["failed"]) == (1, 0)
