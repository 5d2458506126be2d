"""What a user reads after a mistake: one line that names field, value and remedy, exit code 2, nothing half-made."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

Cli = Callable[..., tuple[int, str, str]]

LAUGHS = "x0: &x0 [lol]\n" + "".join(f"x{n}: &x{n} [{', '.join([f'*x{n - 1}'] * 9)}]\n" for n in range(1, 30))
"""Thirty lines that YAML's aliases make 9 ** 29 entries of."""

TURBO = ("model=zimage_turbo", "engine.device=cpu")

TABLE: list[tuple[list[str], str]] = [
    (["+experiment=nope"], "experiment=nope: no such option; available: .*quickstart"),
    (["+experiment=quickstrat"], "did you mean experiment=quickstart?"),
    (["engine=comfyui"], "engine=comfyui: no such option; available: .*diffusers"),
    (["bogus=1"], "bogus: no such field; fields here: name"),
    (["prompts=data/my.csv"], "prompts=data/my.csv: write prompts=csv prompts.path=data/my.csv$"),
    (["model=Tongyi-MAI/Z-Image-Turbo"], "model=Tongyi-MAI/Z-Image-Turbo: write model=zimage_turbo$"),
    (["model=me/mine"], "model=me/mine: write model=zimage_turbo model.repo=me/mine$"),
    (["model=~/x"], "model=~/x: write model=local model.path=~/x$"),
    (["model=/root/x"], "model=/root/x: write model=local model.path=/root/x$"),
    (["seeds=range(1,4)"], r"seeds=range\(1,4\): write seeds=1-3 for these seeds in one run, or add -m to sweep"),
    (["seeds=choice(1,4)"], r"seeds=choice\(1,4\): add -m to sweep over these values$"),
    (["prompt=a", "hydra.verbose=true"], "hydra.verbose is not used: every run writes run.log"),
    (["--config-dir", "c", "--config-dir=d", "prompt=a"], "--config-dir is given twice, and only one folder can be"),
    (["name=${oc.env:NO_SUCH}"], r"name=\$\{oc.env:NO_SUCH\}: the environment variable NO_SUCH is not set: set it"),
    (["foo"], r"foo: write field=value; for the text of a picture prompt='\.\.\.', or see --help; commands: run, "),
    (["dry_run"], r"dry_run: write field=value, here dry_run=true$"),
    (["dryrun"], r"dryrun: write field=value; did you mean dry_run=true\?$"),
    (["sampling.height"], r"sampling.height: write field=value, here sampling.height=\.\.\.$"),
    (["a red fox"], r"a red fox: write field=value; for the text"),
    (
        ["seeds=[1,2"],
        r"seeds=\[1,2: not readable as a list or mapping: look for a bracket or quotation mark not closed$",
    ),
    (["seeds=1,2"], r"""seeds=1,2: write seeds='\[1,2\]' for all in one run, or add -m to sweep over"""),
    (["resume"], "resume: write field=value, here resume=latest$"),
    (["version"], "version: write python -m zimage_runner --version$"),
    (["generate", "prompt=a"], r"generate: write python -m zimage_runner run prompt='\.\.\.'$"),
    (["list"], "list: write python -m zimage_runner status$"),
    (
        ["--config", "my.yaml"],
        "--config: experiments of your own are in a folder: --config-dir FOLDER [+]experiment=NAME",
    ),
    (["--resolve", "prompt=a"], "--resolve goes with --cfg job, which prints the run's settings: add that"),
    (["--r", "prompt=a"], "--r: this may be --resolve or --run: write the whole word$"),
    (["prompt=a", "size=512x512"], r"size: no such field: write sampling.width=W sampling.height=H$"),
    (["prompt=a", f"output_file={'a' * 300}"], r"a{60}\.\.\.: no file can have so long a name: is it a text\?$"),
    (["prompt=a", "model=local", f"model.path={'a' * 300}"], "no file can have so long a name"),
    (["prompt=a", "n=4"], "n: no such field: for several pictures give several seeds, seeds=1-4$"),
    (["prompt=a", "-n", "4"], "-n: no such option: for several pictures give several seeds, seeds=1-4$"),
    (["prompt=a", "num_images=4"], "num_images: no such field: for several pictures give several seeds, seeds=1-4$"),
    (["prompt=a", "scheduler=dpm"], "scheduler: no such field: Euler is the model's own sampler; leave it out$"),
    (["prompt=a", "batch_size=4"], "batch_size: no such field; did you mean engine.batch_size[?]$"),
    (["prompt=a", "image=in.png"], "image: no such field; did you mean sampling.image[?]$"),
    (["prompt=a", "img=in.png"], "img: no such field: write sampling.image=FILE$"),
    (["--experimental-rerun", "x"], "--experimental-rerun: no such option: resume=RUN goes on with a run$"),
    (["--hel"], "--hel: write the whole word, --help$"),
    (["--vers", "prompt=a"], "--vers: write the whole word, --version$"),
    (["prompt=a", "--lowvram"], "--lowvram: no such option: memory=auto, the default, takes what fits"),
    (
        ["prompt=a", *TURBO, "model.controlnet=embedded"],
        "model.controlnet=embedded fits model=zimage_nano alone: choose that, or give a file made for zimage_turbo$",
    ),
    (["prompt=a", *TURBO, "model.controlnet=no.safetensors"], "no.safetensors: no such file or directory$"),
    (["prompt=a", "overwrite=true"], "overwrite: no such field: every run has a new folder, nothing is overwritten"),
    (
        ["prompts=/tmp"],
        r"prompts=/tmp: write prompts=files prompts.glob='/tmp/\*.txt', prompts=folder prompts.path=/tmp ",
    ),
    (["prompts=p.json"], "prompts=p.json: write prompts=jsonl prompts.path=p.json$"),
    (["steps=4"], "steps: no such field; did you mean sampling.num_inference_steps[?]$"),
    (["width=128"], "width: no such field; did you mean sampling.width[?]$"),
    (["name='a"], """name='a: not readable as a value: quote it twice, name='"a"'$"""),
    (["一只=猫"], "一只=猫: 一只 is no field's name; for the text"),
    (["name=my cats"], r"zimage_runner: name='my cats' is not a folder name"),
    (["prompts.texts=一只猫"], r"""prompts.texts=一只猫: a list is needed: write prompts.texts='\["a"""),
    (["sampling.heigth=128"], "sampling.heigth: no such field; did you mean height?"),
    (["+sampling.heigth=128"], "heigth: no such field of Sampling, and [+] cannot add one; did you mean height?"),
    (["+warmup.passes=2"], "warmup.passes: not a field of warmup=none, only of warmup=generate, warmup=article"),
    (["prompts.columns.text=x"], "prompts.columns: not a field of prompts=inline, only of prompts=jsonl, prompts=csv"),
    (["executor.resources={tpu: 1}"], "executor.resources: not a field of executor=inline, only of executor=ray: "),
    (["executor=ray", "executor.resources={tpu: 1, b: x}"], "executor.resources.b=x: not a number"),
    (["memory.fraction=1"], "memory.fraction: no such field"),
    (
        ["warmup.passes=0"],
        "warmup.passes: not a field of warmup=none, only of warmup=generate, warmup=article: choose that or leave",
    ),
    (["warmup=generate", "warmup.passes=0"], "warmup.passes=0 is below 1: use 1 or more, or warmup=none"),
    (["sampling.num_inference_steps=four"], "sampling.num_inference_steps=four: not a whole number: write"),
    (["sampling.guidance_scale=high"], "sampling.guidance_scale=high: not a number: write one such as 2.5$"),
    (["verify=maybe"], "verify=maybe: neither true nor false: write one of them$"),
    (["sampling.height=128,256"], "sampling.height=128,256: add -m to sweep over these values$"),
    (["name=a,b"], "name=a,b: add -m to sweep over these values$"),
    (["prompt=a", "model.revision=a,b"], """model.revision=a,b: write model.revision='"a,b"' for text, or add -m to"""),
    (["prompt=a", "name=my_cats_(1)"], r"name='my_cats_\(1\)' is not a folder name: use letters, digits, '.', '-' and"),
    (["model.dtype=float8"], "model.dtype=float8: .*expected one of .*bfloat16"),
    (["sampling.height=100"], "sampling.height=100 is not a positive multiple of 16: use 96"),
    (["sampling.height=0"], "sampling.height=0 is not a positive multiple of 16: use 16"),
    (["sampling.height=-128"], "sampling.height=-128 is not a positive multiple"),
    (["sampling.width=160000"], "sampling.width=160000 is larger than 4096 pixels"),
    (["sampling.height=256", "sampling.width=256"], "zimage_nano can only draw"),
    (["sampling.num_inference_steps=0"], "sampling.num_inference_steps=0 is out of range: use 1 to"),
    (["sampling.guidance_scale=-1"], "sampling.guidance_scale=-1.0 is out of range"),
    (["sampling.guidance_scale=nan"], "sampling.guidance_scale=nan is out of range"),
    (["sampling.negative_prompt=blurry"], "negative_prompt='blurry' has no effect with guidance_scale=0"),
    (["seeds=[-1]"], "seeds: -1 is out of range"),
    (["seeds=[1,1]"], "seeds: 1 is given twice"),
    (["seeds=[]"], "seeds=.* is empty"),
    (["seeds=9-0"], "seeds: the range 9-0 runs backwards"),
    (["model.dtype=float16"], "model.dtype=float16 overflows with Z-Image .*use bfloat16"),
    (["engine.device=cuda"], "engine.device=cuda but .*use engine.device=cpu"),
    (["engine.batch_size=0"], "engine.batch_size=0 is below 1"),
    (["engine.threads=0"], "engine.threads=0 is out of range: use 1 to 1024"),
    (["engine=diffusers", "engine.threads=-1"], "engine.threads=-1 is out of range"),
    (["engine.threads=all"], "engine.threads=all: .*int"),
    (["model=local"], "model.path is not set"),
    (["model.path=nowhere"], "model.path=.*nowhere.*no such directory"),
    (["name=../up"], "name='../up' is not a folder name"),
    (["output.png_compress_level=11"], "output.png_compress_level=11 is out of range"),
    (["output.root=/proc/nowhere"], "cannot make the run directory .*set output.root"),
    (["output_file=x.png", "seeds=[1,2]"], "output_file='x.png' takes one picture, but this run draws 2"),
    (["prompts.texts=[a]"], "prompt and prompts are both set"),
    (["--steps", "4"], "--steps: no such option; .* without dashes: sampling.num_inference_steps=4$"),
    (["--dry-run"], "--dry-run: .* without dashes: dry_run=true$"),
    (["--resume=latest"], "--resume: .* without dashes: resume=latest$"),
    (["-p", "a red cat"], "-p: .* without dashes: prompt='a red cat'$"),
    (["--xyz"], "--xyz: no such option; fields are set as field=value, without dashes: see --help$"),
    (["--cfg=yaml"], "--cfg yaml: write --cfg job for the run's settings [(]or hydra, all[)]$"),
    ([" "], "an empty word is on the command line"),
    (["--config-dir"], "--config-dir: its value is missing"),
    (["--config-dir", "nowhere"], "--config-dir: there is no folder .*nowhere: name the one that holds experiment/"),
    (["--config-name", "cats"], "--config-name cats: leave it out; an experiment is chosen with [+]experiment=cats"),
    (["sampling.steps=4"], "sampling.steps: no such field; did you mean num_inference_steps[?]$"),
    (["model=null"], "model=null is no option: choose one of its options"),
    (["name=null"], "zimage_runner: name=null: this field takes no null: write a value, or leave it out$"),
    (["~sampling"], "~sampling: every run needs an option of this group: leave it out, or write sampling= and one of "),
    (["compile=null"], "compile=null is no option: compile=none does without$"),
    (["quickstart"], "quickstart: write [+]experiment=quickstart$"),
    (["+exp=quickstart"], "exp: no such field or group, and [+] cannot add one; did you mean [+]experiment[?]"),
    (["+experiment=quickstart", "+experiment=turbo"], r"chosen twice: write \+experiment=\[one,other\]"),
    (["my/experiment/cats.yaml"], "an experiment is named, not its file: --config-dir my [+]experiment=cats$"),
    (["+experiment=my/cats.yaml"], "not its file: .*[+]experiment=cats, the file being FOLDER/experiment/cats.yaml"),
    (["out=cat.png"], "out: no such field; did you mean output_file[?]$"),
    (["output=cat.png"], "output=cat.png: write output_file=cat.png for a single picture"),
    (["prompts=cats.csv"], "prompts=cats.csv: write prompts=csv prompts.path=cats.csv$"),
    (["output_file=."], "output_file=. is a directory: name the picture, e.g. output_file=picture.png"),
    (["output_file=/dev/null"], "output_file=/dev/null is a device: only plain files are replaced: name another file$"),
    (["output_file=/dev/full"], "output_file=/dev/full is a device: only plain files are replaced"),
    (["output_file=/dev/stdout"], "output_file=/dev/stdout is a link: only plain files are replaced"),
    (["output_file=/dev/null/cat.png"], "output_file=/dev/null/cat.png: /dev/null is no folder: name another file$"),
    (["output_file=new/"], "output_file=new/ is a directory: name the picture"),
    (["output_file=cat.jpg"], "output_file=cat.jpg: pictures are written as PNG: use output_file=cat.png$"),
]


@pytest.mark.parametrize(("argv", "expected"), TABLE, ids=[" ".join(argv) for argv, _ in TABLE])
def test_one_line(cli: Cli, tmp_path: Path, argv: list[str], expected: str) -> None:
    code, out, err = cli("prompt=a cat", *argv)
    assert_refused(code, out, err, expected)
    assert not list(tmp_path.iterdir())


NO_PROMPT: list[tuple[list[str], bytes | None, str]] = [
    ([], None, "prompts.texts is empty: write prompt='a cat'"),
    (["prompt="], None, "prompt='' is empty"),
    (["prompts.texts=['']"], None, r"prompts.texts\[0\]"),
    (["prompts=text_file"], None, "prompts.path"),
    (["prompts=text_file", "prompts.path=p"], None, "prompts.path=p does not exist"),
    (["prompts=text_file", "prompts.path=p"], b"", "prompts.path=p is empty"),
    (["prompts=text_file", "prompts.path=p"], b"a cat\n\xff\n", "p:2: .*UTF-8"),
    (["prompts=jsonl", "prompts.path=p"], b'{"prompt": "a"}\n{"prompt": \n', "p:2: "),
    (["prompts=jsonl", "prompts.path=p"], b'{"prompt": "a", "heigth": 128}\n', "p:1: .*heigth"),
    (["prompts=jsonl", "prompts.path=p"], b'{"prompt": "a", "height": "tall"}\n', "p:1: .*height"),
    (["prompts=jsonl", "prompts.path=p"], b'{"prompt": "a", "height": 100}\n', "p:1: .*height=100"),
]


@pytest.mark.parametrize(("argv", "content", "expected"), NO_PROMPT)
def test_bad_prompts(cli: Cli, tmp_path: Path, argv: list[str], content: bytes | None, expected: str) -> None:
    if content is not None:
        (tmp_path / "p").write_bytes(content)
    code, out, err = cli(*argv)
    assert_refused(code, out, err, expected)
    assert [p.name for p in tmp_path.iterdir()] == ([] if content is None else ["p"])


@pytest.mark.parametrize(
    "argv",
    [
        ["output.root=mine/a/b"],
        ["output.root=$PWD/mine/a/b"],
        ["output.root=$PWD/mine"],
        ["continue=mine/a/b"],
        [f"output.root=mine/a/{'n' * 300}"],
        ["output.root=mine/../a"],
        ["output.root=mine/../mine/b"],
        ["hydra.run.dir=$PWD/mine/../a/b"],
        ["-m", "seeds=1,2", "hydra.sweep.dir=mine/../a/b"],
        ["-m", "seeds=1,2", "output.root=$PWD/mine/a/b"],
        ["-m", "seeds=1,2", "output.root=mine"],
        ["-m", "seeds=1,2", "output.root=mine", "hydra.launcher.keep_going=false"],
    ],
)
def test_of_the_folders_above_a_refused_run_those_that_were_there_stay(
    cli: Cli, tmp_path: Path, argv: list[str]
) -> None:
    (tmp_path / "mine").mkdir()
    code, out, err = cli("prompt=a cat", "model.path=nowhere", *(word.replace("$PWD", str(tmp_path)) for word in argv))
    assert (code, out) == (2, ""), err
    assert list(tmp_path.rglob("*")) == [tmp_path / "mine"]


def test_typo_in_an_experiment_file_names_the_file(cli: Cli, tmp_path: Path) -> None:
    folder = tmp_path / "my_conf" / "experiment"
    folder.mkdir(parents=True)
    (folder / "mine.yaml").write_text("# @package _global_\nsampling:\n  stepz: 3\n", encoding="utf-8")
    code, out, err = cli("--config-dir", "my_conf", "+experiment=mine", "prompt=a")
    assert_refused(code, out, err, "mine.*stepz: no such field")


@pytest.mark.parametrize(
    ("lines", "expected"),
    [
        ("prompts:\n\ttexts: [a]\n", "mine.yaml:3: .*; indent with blanks instead of tabs"),
        ("prompts: {texts: a cat}\n", "prompts.texts takes a list: write"),
        (
            "prompts: {texts: [a: b, c]}\n",
            r"prompts.texts\[0\]: {'a': 'b'} is no text: put a prompt that holds a colon in",
        ),
        ("prompt: a cat: big\n", "mine.yaml:2: .*; put text that holds a colon in quotation marks"),
        ("prompts: {texts: [a, null]}\n", r"mine.yaml: prompts.texts\[1\] is empty: write a text"),
        ("prompts:\n", "mine.yaml: prompts: there is no value after the colon"),
        (
            "model: zimage_turbo\n",
            "mine.yaml: model: zimage_turbo: .* list of defaults: '- override /model: zimage_turbo'",
        ),
        ("engine: fast\n", r"mine.yaml: engine: fast: this is no single value: .* \(.*device"),
        ("sampling: 4\n", r"mine.yaml: sampling: 4: this is no single value: .* \(.*height, .*width\)$"),
        ("embedding_cache: here\n", "mine.yaml: embedding_cache: here: this is no single value"),
        ("- a\n", "mine.yaml: a list stands where field: value is needed: remove the dashes"),
        ("sampling: [4]\n", r"mine.yaml: sampling: \[4\]: this is no single value"),
        ("prompt: a ${b}\n", r"prompt: \$\{b\} refers to no field: write \\\$\{"),
        (
            "defaults: [override model: zimage_turbo]\n",
            "mine.yaml: override model: write it with a slash, '- override /m",
        ),
        ("defaults: [/model: zimage_turbo]\n", "model is chosen already: write '- override /model: zimage_turbo'"),
        ("defaults: [override /modle: x]\n", "mine.yaml: modle: no such config group; did you mean model[?]"),
        (
            "name: b\nprompts: &a\n  texts: *a\n",
            "mine.yaml: its aliases unfold to too much: write out what they stand for",
        ),
        (
            f"prompt: {'[' * 3000}{']' * 3000}\n",
            "mine.yaml: it is nested more than 100 deep: put ",
        ),
        (
            f"prompt: {'[' * 150}{']' * 150}\n",
            "mine.yaml: it is nested more than 100 deep: put ",
        ),
        (
            LAUGHS,
            "mine.yaml: its aliases unfold to too much: write out what they stand for",
        ),
        ("sampling: {steps: 4}\n", "mine.yaml: sampling.steps: no such field; did you mean num_inference_steps[?]"),
    ],
)
def test_slips_in_an_experiment_file(cli: Cli, tmp_path: Path, lines: str, expected: str) -> None:
    folder = tmp_path / "my_conf" / "experiment"
    folder.mkdir(parents=True)
    (folder / "mine.yaml").write_text(f"# @package _global_\n{lines}", encoding="utf-8")
    assert_refused(*cli("--config-dir", "my_conf", "+experiment=mine"), expected)
    (folder / "mine.yaml").write_text("name: cats\n", encoding="utf-8")
    assert_refused(*cli("--config-dir", "my_conf", "+experiment=mine", "prompt=a"), "first line has to be '# @package")


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"defaults: [override /model: zimage_turbo]\n", "mine.yaml: the file's first line has to be '# @package"),
        (b"\xef\xbb\xbf# @package _global_\nname: a\n", "mine.yaml:1: starts with a byte order mark: save the file as"),
        (
            "# @package _global_\nprompt: café\n".encode("latin-1"),
            "mine.yaml:2: byte 0xe9 is not UTF-8: save the file as",
        ),
        (b"", "mine.yaml: the file's first line has to be"),
    ],
)
def test_files_that_are_no_experiments(cli: Cli, tmp_path: Path, content: bytes, expected: str) -> None:
    folder = tmp_path / "my_conf" / "experiment"
    folder.mkdir(parents=True)
    (folder / "mine.yaml").write_bytes(content)
    assert_refused(*cli("--config-dir", "my_conf", "+experiment=mine", "prompt=a"), expected)
    assert_refused(
        *cli("--config-dir", "my_conf/experiment", "+experiment=mine", "prompt=a"), "takes the folder above it"
    )
    assert [p.name for p in tmp_path.iterdir()] == ["my_conf"]


@pytest.mark.parametrize(
    ("damage", "expected"), [("truncate", "transformer.*(truncated|bytes)"), ("remove", "missing")]
)
def test_damaged_model_directory(cli: Cli, tmp_path: Path, nano: Path, damage: str, expected: str) -> None:
    model = tmp_path / "model"
    shutil.copytree(nano, model)
    shard = model / "transformer" / "diffusion_pytorch_model.safetensors"
    if damage == "truncate":
        os.truncate(shard, shard.stat().st_size // 2)
    else:
        shard.unlink()
    code, out, err = cli("prompt=a cat", "model.path=model")
    assert_refused(code, out, err, expected)
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


def assert_refused(code: int, out: str, err: str, expected: str) -> None:
    assert code == 2
    assert out == ""
    lines = err.strip().splitlines()
    assert len(lines) == 1, err
    assert lines[0].startswith("zimage_runner: ")
    assert re.search(expected, lines[0]), lines[0]
