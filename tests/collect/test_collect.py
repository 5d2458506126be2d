"""Pictures of runs in one folder, with a table, and on contact sheets."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from tests.support.made_pictures import ENTRY, write_run
from zimage_runner.collect.__main__ import main
from zimage_runner.collect.folder import LOCK, LONGEST, _filled, held
from zimage_runner.errors import UserError
from zimage_runner.outputs import atomic
from zimage_runner.outputs.stars import Stars


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    items = {("00001_a_dog", 3): {"id": "Dog/1", "metadata": {"tag": "x"}}, ("00000_a_cat", 12): {"id": "c"}}
    return write_run(tmp_path / "outputs" / "pets" / "one", items)


def rows(folder: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path(folder, "metadata.jsonl").read_text(encoding="utf-8").splitlines()]


def test_names_links_and_table(run: Path) -> None:
    assert main([str(run), "into=all"]) == 0
    assert sorted(os.listdir("all")) == ["00000_a_cat_seed_12.png", "00001_a_dog_seed_3.png", "metadata.jsonl"]
    cat, dog = rows("all")
    assert cat["file_name"] == "00000_a_cat_seed_12.png"
    assert (cat["text"], cat["seed"], cat["width"]) == ("a cat", 12, 32)
    assert "metadata" not in cat
    assert dog["metadata"] == {"tag": "x"}
    assert os.path.samefile(dog["source"], "all/00001_a_dog_seed_3.png")


def test_made_again_after_a_resume(run: Path) -> None:
    assert main(["outputs", "into=all"]) == 0
    write_run(run.parent / "two", {("00002_a_fox", 1): {}})
    assert main(["outputs", "into=all"]) == 0
    assert [row["text"] for row in rows("all")] == ["a cat", "a dog", "a fox"]


def test_rows_of_pictures_that_other_calls_brought_are_kept(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    two = write_run(run.parent / "two", {("00002_a_fox", 1): {}, ("00004_a_hen", 1): {}})
    assert main([str(run), "into=all"]) == 0
    assert main([str(two), "into=all"]) == 0
    os.unlink("all/00002_a_fox_seed_1.png")
    three = write_run(run.parent / "three", {("00003_an_owl", 1): {}})
    assert main([str(three), "into=all"]) == 0
    assert [row["text"] for row in rows("all")] == ["a cat", "a dog", "a hen", "an owl"]
    shutil.rmtree(two)
    write_run(two, {("00002_a_fox", 1): {}, ("00004_a_hen", 1): {"metadata": {"tag": "y"}}})
    for _ in range(2):
        assert main([str(two), "into=all", "overwrite=true"]) == 0
        assert [row["text"] for row in rows("all")] == ["a cat", "a dog", "a fox", "a hen", "an owl"]
    assert rows("all")[3]["metadata"] == {"tag": "y"}
    assert [*sorted(row["file_name"] for row in rows("all")), "metadata.jsonl"] == sorted(os.listdir("all"))
    table = Path("all/metadata.jsonl")
    for line in (b"{\n", b"[1]\n", b'{"text": "a cat"}\n', b"\xff\n"):
        table.write_bytes(line)
        capsys.readouterr()
        assert main([str(run), "into=all"]) == 2
        assert "all/metadata.jsonl, line 1: no row of a picture: remove the table, or" in capsys.readouterr().err
        assert table.read_bytes() == line


@pytest.mark.parametrize(
    ("words", "held_folder"), [([], "all"), (["layout=webdataset"], "all"), (["layout=parquet"], "all/data")]
)
def test_nobody_collects_into_a_folder_in_which_another_does(
    run: Path, capsys: pytest.CaptureFixture[str], words: list[str], held_folder: str
) -> None:
    with held(Path(held_folder)):
        before = sorted(Path("all").rglob("*"))
        assert main([str(run), "into=all", *words]) == 2
        told = f"zimage_runner: {held_folder} is in use by process {os.getpid()} on {socket.gethostname()}: wait for it"
        assert capsys.readouterr().err.startswith(told)
        assert sorted(Path("all").rglob("*")) == before
    Path(held_folder, LOCK).write_bytes(b"")  # of a process that was killed
    assert main([str(run), "into=all", *words]) == 0
    assert list(Path("all").rglob(LOCK)) == []


def test_ones_own_names(run: Path) -> None:
    assert main(["outputs/pets", "into=all", "name={id}-{seed:03d}-{run}-{job}.png"]) == 0
    assert [row["file_name"] for row in rows("all")] == ["c-012-pets-one.png", "dog_1-003-pets-one.png"]


def test_the_names_of_the_guide_need_no_ids(run: Path) -> None:
    guide = (Path(__file__).parents[2] / "docs/howto.md").read_text(encoding="utf-8")
    other = write_run(run.parent / "two", {("00000_a_cat", 12): {}, ("00001_a_cat", 12): {}})
    names = re.findall(r"^python -m zimage_runner collect .* name='(.*?)'", guide, re.M)
    assert names
    for number, name in enumerate(names):
        assert main([str(other), f"into=all{number}", f"name={name}"]) == 0


def test_another_picture_is_not_overwritten_unasked(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("all").mkdir()
    Path("all/00001_a_dog_seed_3.png").write_text("mine", encoding="utf-8")
    assert main([str(run), "into=all"]) == 2
    assert "is there already, and another picture" in capsys.readouterr().err
    assert Path("all/00001_a_dog_seed_3.png").read_text(encoding="utf-8") == "mine"
    assert os.listdir("all") == ["00001_a_dog_seed_3.png"]
    assert main([str(run), "into=all", "overwrite=true"]) == 0
    assert os.path.samefile(rows("all")[1]["source"], "all/00001_a_dog_seed_3.png")


def test_starred_ones_alone_and_rejected_ones_left_out(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cat, dog = "items/00000_a_cat/seed_12", "items/00001_a_dog/seed_3"
    other = write_run(run.parent / "two", {("00000_a_cat", 12): {}, ("00000_a_cat", 13): {}})
    (run / "stars.json").write_text(Stars(starred={dog}, rejected={cat}).to_json().decode(), encoding="utf-8")
    assert main(["outputs", "into=best", "starred=true"]) == 0
    assert [(row["text"], row["seed"]) for row in rows("best")] == [("a dog", 3)]
    assert main(["outputs", "into=rest", "rejected=false"]) == 0
    assert [(row["text"], row["seed"]) for row in rows("rest")] == [("a dog", 3), ("a cat", 12), ("a cat", 13)]
    (other / "stars.json").write_text("{", encoding="utf-8")
    capsys.readouterr()
    assert main(["outputs", "into=x", "starred=true"]) == 2
    assert "two/stars.json is damaged" in capsys.readouterr().err
    assert not Path("x").exists()


def test_contact_sheets(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_run(run.parent / "two", {(f"{n:05d}_x", 1): {} for n in range(5)})
    assert main(["outputs", "sheet=s/all.png", "columns=2", "rows=2", "tile=64"]) == 0
    assert capsys.readouterr().out.splitlines() == ["s/all.png", "s/all_2.png"]
    with Image.open("s/all.png") as full, Image.open("s/all_2.png") as rest:
        # Pictures of 32x16 are not blown up to the tile's 64, and stand in the middle of a square.
        assert full.size == (2 * 36 + 4, 2 * (36 + 60) + 4)
        assert rest.size[0] == full.size[0]
        assert full.getpixel((5, 4 + 8)) == (1, 0, 12)  # the cat comes first, whatever the ledger's order
        assert full.getpixel((5 + 36, 4 + 8)) == (0, 0, 3)
        assert full.getpixel((5, 4)) == (255, 255, 255)


def test_large_pictures_are_made_smaller_on_a_sheet(run: Path) -> None:
    assert main(["outputs", "sheet=all.png", "tile=16", "columns=1"]) == 0
    with Image.open("all.png") as sheet:
        assert sheet.size == (16 + 8, 2 * (20 + 60) + 4)


def test_a_picture_that_two_runs_share_is_collected_once(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As skip_existing leaves them: one file with two names. Another picture of that name is still refused."""
    second = write_run(run.parent / "two", {("00000_a_cat", 12): {}, ("00002_a_fox", 1): {}})
    shared = Path("items/00000_a_cat/seed_12/image.png")
    (second / shared).unlink()
    os.link(run / shared, second / shared)
    assert main(["outputs/pets", "into=all"]) == 0
    assert capsys.readouterr().err == "3 pictures, listed in all/metadata.jsonl\n"
    assert [row["text"] for row in rows("all")] == ["a cat", "a dog", "a fox"]
    Image.new("RGB", (320, 160)).save(second / "x.png")
    os.replace(second / "x.png", second / shared)
    assert main(["outputs/pets", "into=other"]) == 2
    assert "gives 00000_a_cat_seed_12.png to both" in capsys.readouterr().err


def test_letters_that_no_font_has_are_told(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from zimage_runner.collect import contact_sheet

    monkeypatch.setattr(contact_sheet, "is_shown", lambda text, font: text.isascii())
    write_run(run.parent / "two", {("00003_一只猫", 1): {}})
    assert main(["outputs", "sheet=all.png"]) == 0
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "no font here" in line]
    assert "no font here shows every letter of 1 of the sheet's captions (the first is " in line
    assert "00003" in line


def test_pictures_that_were_cut_off_are_left_out(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One is told of, and draw-again works; an empty one is damaged, too."""
    write_run(run.parent / "two", {("00003_x", 1): {}})
    picture = run / "items/00000_a_cat/seed_12/image.png"
    size = picture.stat().st_size
    os.truncate(picture, size // 2)
    os.truncate(run.parent / "two/items/00003_x/seed_1/image.png", 0)
    assert main(["outputs", "into=all"]) == 0
    assert [row["text"] for row in rows("all")] == ["a dog"]
    err = capsys.readouterr().err
    assert err.endswith("1 picture, listed in all/metadata.jsonl\n")
    assert (
        f"a damaged picture is left out (items/00000_a_cat/seed_12: {size // 2} bytes instead of {size}): draw again "
        f"with resume={run}"
    ) in err


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["nowhere", "into=x"], "nowhere is no directory: give a run directory"),
        (["outputs/pets/one/items", "into=x"], "holds no run: give a run directory"),
        (["outputs"], "nothing to do: add into=FOLDER"),
        (["into=x"], "no run is named"),
        (["outputs", "inot=x"], "inot=x: no such field; fields here: into"),
        (["outputs", "into=x", "tile=64"], "tile=64 has no effect without sheet="),
        (["outputs", "sheet=x.png", "name=a"], "name=a has no effect without into="),
        (["outputs", "sheet=x.jpg"], "contact sheets are PNG: use sheet=x.png"),
        (["outputs", "sheet=x.png", "columns=0"], "columns=0: write a whole number from 1"),
        (["outputs", "into=x", "overwrite=maybe"], "overwrite=maybe: write true or false"),
        (["outputs", "into=x", "starred=1"], "starred=1: write true or false"),
        (["outputs", "into=x", "starred=true"], "no picture there is starred; python -m zimage_runner view marks them"),
        (["outputs", "into=x", "name={foo}"], "no such blank {foo}; there are index, slug"),
        (["outputs", "into=x", "name={seed"], "name={seed: .*write blanks as {index:05d}"),
        (["outputs", "into=x", "name=same"], "gives same.png to both"),
        (["outputs", "into=x", "name=a/{index}"], "which is no plain file name"),
        (["outputs", "into=f"], "into=f is a file: name a folder"),
        (["outputs", "into="], "into= is empty: write what is meant, or leave it out"),
        (["outputs", "into=x", "sheet="], "sheet= is empty: write what is meant"),
        (["", "into=x"], "a word is empty: write what is meant, or leave it out (is a variable of the shell not set?)"),
        (["outputs", "into=x", "name={index:999999999999999d}"], "name={index:999999999999999d}: .*write blanks as"),
        (["outputs", "sheet=f/x.png"], "f is no folder: name another"),
        (["outputs", "into=x.zip"], "into=x.zip: pictures are collected in a folder, not an archive: use into=x, then"),
    ],
)
def test_refusals(run: Path, capsys: pytest.CaptureFixture[str], argv: list[str], expected: str) -> None:
    Path("f").touch()
    assert main(argv) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert len(err.splitlines()) == 1
    assert expected.split(".*")[-1] in err
    assert sorted(os.listdir()) == ["f", "outputs"]


def test_a_damaged_record_and_a_foreign_ledger(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with (run / "records.jsonl").open("a", encoding="utf-8") as ledger:
        for item in ("../../x", "items/a", "/etc/passwd", "items/00003_../../seed_1"):
            ledger.write(json.dumps({"item": item, **ENTRY, "bytes": 1}) + "\n")
    assert main([str(run), "into=all"]) == 0
    assert len(rows("all")) == 2
    (run / "items/00001_a_dog/seed_3/record.json").write_text("{", encoding="utf-8")
    assert main([str(run), "into=all"]) == 2
    assert "record.json cannot be read" in capsys.readouterr().err


@pytest.mark.parametrize("part", [{"params": 5}, {"model": "x"}, {"prompt": ["a cat"]}, {"seed": "3"}])
@pytest.mark.parametrize("layout", ["imagefolder", "webdataset"])
def test_a_record_with_a_part_of_another_shape(
    run: Path, capsys: pytest.CaptureFixture[str], part: dict[str, Any], layout: str
) -> None:
    file = run / "items/00001_a_dog/seed_3/record.json"
    file.write_text(json.dumps(json.loads(file.read_text(encoding="utf-8")) | part), encoding="utf-8")
    assert main([str(run), "into=all", f"layout={layout}"]) == 2
    assert f"{file} is no record: draw it again with resume={run} verify=true" in capsys.readouterr().err


@given(st.text(), st.text(min_size=1), st.integers(0, 2**63 - 1))
def test_a_name_is_a_plain_file_name_or_refused(name: str, text: str, seed: int) -> None:
    try:
        filled = _filled(name + "{text}_{seed}", {"text": text, "seed": seed})
    except UserError:
        return
    assert Path(f"{filled}.png").name == f"{filled}.png"
    assert len(filled.encode()) <= LONGEST
    assert filled.isprintable()


@pytest.mark.parametrize(
    ("options", "suffix", "kind"),
    [
        (["format=jpeg"], "jpg", "JPEG"),
        (["format=jpg", "quality=100"], "jpg", "JPEG"),
        (["format=webp"], "webp", "WEBP"),
        (["format=webp", "quality=lossless"], "webp", "WEBP"),
    ],
)
def test_other_formats_keep_the_parameters(run: Path, options: list[str], suffix: str, kind: str) -> None:
    text = "a red 猫\nSteps: 8, Seed: 12"
    source = run / "items" / "00000_a_cat" / "seed_12" / "image.png"
    info = PngInfo()
    info.add_itxt("parameters", text)
    with Image.open(source) as image:
        image.save(source, pnginfo=info)
    for _ in range(2):  # the second time nothing is left to do
        assert main([str(run), "into=all", *options]) == 0
    assert sorted(os.listdir("all")) == [
        f"00000_a_cat_seed_12.{suffix}",
        f"00001_a_dog_seed_3.{suffix}",
        "metadata.jsonl",
    ]
    assert [row["file_name"] for row in rows("all")] == sorted(os.listdir("all"))[:2]
    with Image.open(f"all/00000_a_cat_seed_12.{suffix}") as made, Image.open(source) as original:
        assert made.format == kind
        comment = made.getexif().get_ifd(0x8769)[0x9286]
        assert comment == b"UNICODE\0" + text.encode("utf-16-be")
        difference = np.abs(np.asarray(made.convert("RGB"), np.int16) - np.asarray(original, np.int16)).max()
        assert difference == 0 if "quality=lossless" in options else difference < 12
    with Image.open(f"all/00001_a_dog_seed_3.{suffix}") as made:
        assert 0x9286 not in made.getexif().get_ifd(0x8769)


def test_a_converted_picture_that_has_changed_is_told(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(run), "into=all", "format=webp"]) == 0
    source = run / "items" / "00000_a_cat" / "seed_12" / "image.png"
    with Image.open(source) as image:
        image.point(lambda value: 255 - value).save(source)
    assert main([str(run), "into=all", "format=webp"]) == 2
    assert "is there already, and another picture" in capsys.readouterr().err
    assert main([str(run), "into=all", "format=webp", "overwrite=true"]) == 0
    assert main([str(run), "into=all", "format=webp"]) == 0
    assert not [name for name in os.listdir("all") if name.endswith(".tmp")]


def test_a_converted_picture_that_was_drawn_again_to_the_same_is_no_other(run: Path) -> None:
    options = [str(run), "into=all", "format=jpeg"]
    assert main(options) == 0
    made = Path("all/00000_a_cat_seed_12.jpg")
    before = made.read_bytes()
    os.utime(run / "items" / "00000_a_cat" / "seed_12" / "image.png", ns=(5, 5))
    assert main(options) == 0
    assert (made.read_bytes(), made.stat().st_mtime_ns) == (before, 5)
    made.write_bytes(before + b"retouched")
    assert main(options) == 2


def test_an_endless_prompt_fits_into_a_jpeg(run: Path) -> None:
    source = run / "items" / "00000_a_cat" / "seed_12" / "image.png"
    info = PngInfo()
    info.add_text("parameters", "x" * 100_000)
    with Image.open(source) as image:
        image.save(source, pnginfo=info)
    assert main([str(run), "into=all", "format=jpeg"]) == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["format=gif"], "format=gif: write png, jpeg or webp"),
        (["quality=90"], "quality=90 has no effect on PNG"),
        (["format=jpeg", "quality=0"], "quality=0: write a whole number from 1 to 100"),
        (["format=jpeg", "quality=lossless"], "quality=lossless: write a whole number from 1 to 100"),
        (["format=webp", "quality=best"], "quality=best: write a whole number from 1 to 100 or lossless"),
    ],
)
def test_formats_that_are_refused(
    run: Path, options: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(run), "into=all", *options]) == 2
    assert message in capsys.readouterr().err
    assert not Path("all").exists()


def test_another_quality_is_made_when_asked(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def size() -> int:
        return sum(path.stat().st_size for path in Path("all").glob("*.jpg"))

    options = [str(run), "into=all", "format=jpeg"]
    assert main([*options, "quality=100"]) == 0
    best = size()
    assert main([*options, "quality=1"]) == 2
    assert "converted otherwise (quality): use another folder, or overwrite=true" in capsys.readouterr().err
    assert size() == best
    assert main([*options, "quality=1", "overwrite=true"]) == 0
    assert size() < best


def test_a_copy_that_was_begun_is_no_picture(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On another disk; killed in the middle of a copy, the next call makes it whole."""

    def no_link(*_: Any, **__: Any) -> None:
        raise OSError(errno.EXDEV, "another disk")

    def killed(read: Any, write: Any, size: int) -> None:
        write.write(read.read(9))
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "link", no_link)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "copyfileobj", killed)
        assert main([str(run), "into=all"]) == 130
    assert not list(Path("all").glob("*.png"))
    assert main([str(run), "into=all"]) == 0
    assert sorted(os.listdir("all")) == ["00000_a_cat_seed_12.png", "00001_a_dog_seed_3.png", "metadata.jsonl"]
    (cat, dog) = rows("all")
    for row in (cat, dog):
        assert Path(row["source"]).read_bytes() == Path("all", row["file_name"]).read_bytes()
        assert not os.path.samefile(row["source"], Path("all", row["file_name"]))


ITEM = "items/00000_a_cat/seed_12"


@pytest.mark.parametrize("link", ["items", "items/00000_a_cat", ITEM, f"{ITEM}/image.png", f"{ITEM}/record.json"])
@pytest.mark.parametrize("into", ["into=all", "sheet=all.png", "into=all format=webp"])
def test_a_link_in_a_run_is_refused_not_collected(
    run: Path, tmp_path: Path, link: str, into: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """A private key was hard-linked into the data set."""
    (run / link).rename(tmp_path / "key")
    (run / link).symlink_to(tmp_path / "key")
    assert main([str(run), *into.split()]) == 2
    error = capsys.readouterr().err
    assert f"{link} is a link" in error
    assert error.count("\n") == 1
    assert not list(tmp_path.glob("all*/*.png")) + list(tmp_path.glob("all.png"))


def test_a_linked_ledger_is_refused(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (run / "records.jsonl").rename(tmp_path / "ledger")
    (run / "records.jsonl").symlink_to(tmp_path / "ledger")
    assert main([str(run), "into=all"]) == 2
    assert "records.jsonl is a link" in capsys.readouterr().err


def test_only_plain_files_are_replaced(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("all").mkdir()
    precious = tmp_path / "precious"
    precious.write_bytes(b"x")
    for name, words in {
        "all/00000_a_cat_seed_12.png": ["into=all", "overwrite=true"],
        "all/00000_a_cat_seed_12.webp": ["into=all", "overwrite=true", "format=webp"],
        "all/metadata.jsonl": ["into=all", "overwrite=true"],
        "sheet.png": ["sheet=sheet.png"],
    }.items():
        for kind, make in {"a link": lambda path: path.symlink_to(precious), "a FIFO": os.mkfifo}.items():
            make(Path(name))
            assert main([str(run), *words]) == 2
            assert f"{name} is {kind}" in capsys.readouterr().err
            assert os.listdir("all") == ([Path(name).name] if name.startswith("all") else [])
            os.unlink(name)
    assert precious.read_bytes() == b"x"


@pytest.mark.parametrize(
    ("words", "name"),
    [
        (["into=all"], "all/00000_a_cat_seed_12.png"),
        (["into=all", "format=webp"], "all/00000_a_cat_seed_12.webp"),
        (["sheet=sheet.png"], "sheet.png"),
    ],
)
def test_a_file_that_cannot_be_written_is_named(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], words: list[str], name: str
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "link", full)
    monkeypatch.setattr(atomic, "write_all", full)
    shutil.rmtree(run / "items/00001_a_dog")  # one picture: the first thread's error is the one that is told
    assert main([str(run), *words]) == 2
    assert capsys.readouterr().err == f"zimage_runner: {name}: No space left on device\n"
    assert [path.name for path in Path().rglob(".zimage_runner*")] == []


def test_a_reader_that_has_gone_is_no_fault(run: Path) -> None:
    """As with ``collect ... | head -0``, and a disk that is full."""
    for target, told in (("pipe", ""), ("/dev/full", "standard output cannot be written (No space left on device)")):
        read, write = os.pipe() if target == "pipe" else (None, os.open(target, os.O_WRONLY))
        if read is not None:
            os.close(read)
        words = [sys.executable, "-m", "zimage_runner", "collect", str(run), "into=all"]
        done = subprocess.run(words, stdout=write, stderr=subprocess.PIPE, text=True, encoding="utf-8", check=False)
        os.close(write)
        assert done.returncode == 0
        assert done.stderr.splitlines()[0] == "2 pictures, listed in all/metadata.jsonl"
        assert told in done.stderr
        assert "Traceback" not in done.stderr


def test_files_of_the_users_are_not_taken_for_leftovers(run: Path) -> None:
    Path("all").mkdir()
    Path("all/00000_a_cat_seed_12.png.tmp").write_bytes(b"x")
    Path("all/metadata.jsonl.tmp").write_bytes(b"x")
    assert main([str(run), "into=all"]) == 0
    assert Path("all/00000_a_cat_seed_12.png.tmp").read_bytes() == b"x"
    assert Path("all/metadata.jsonl.tmp").read_bytes() == b"x"
