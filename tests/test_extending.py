"""docs/architecture.md, "Where do I add ...": one of each, added to a copy of the package, in the files it names."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

ROOT = Path(__file__).parents[1]
MOST_FILES = 3

REGISTRY = "zimage_runner/config/registry.py"
MEMORY_POLICY = {
    "zimage_runner/memory/policies.py": (
        "def check_memory(",
        '''
@dataclass(kw_only=True, slots=True)
class Frugal(Memory):
    """The encoder makes room early, and some memory is left to others."""

    placement: ClassVar[str] = "frugal"
    engines: ClassVar[tuple[str, ...]] = ("native",)
    staged: ClassVar[bool] = True

    spare_gb: float = 1.0
    """Left to other programs."""

    def __post_init__(self) -> None:
        check_memory(self)
        if self.spare_gb < 0:
            raise UserError(f"memory.spare_gb={self.spare_gb} is negative: use 0 or more")


def check_memory(''',
    ),
    REGISTRY: (
        '        "resident": Resident,\n',
        '        "resident": Resident,\n        "frugal": Frugal,\n',
        "from zimage_runner.memory.policies import (\n    Auto,\n",
        "from zimage_runner.memory.policies import (\n    Auto,\n    Frugal,\n",
    ),
    "conf/memory/frugal.yaml": "# Leaves memory to others.\ndefaults:\n  - /schema/memory/frugal@_here_\n",
}
PROMPT_SOURCE = {
    "zimage_runner/prompts/alphabet.py": '''"""Letters as prompts."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from zimage_runner.prompts.base import Prompt, PromptSource


@dataclass(kw_only=True, slots=True)
class Alphabet(PromptSource):
    """``prompts=alphabet``: a picture of each letter."""

    letters: str = "abc"
    """Which ones."""

    def read(self) -> Iterator[Prompt]:
        for letter in self.letters:
            yield Prompt(text=f"the letter {letter}", source=f"prompts.letters: {letter}")
''',
    REGISTRY: (
        '        "inline": Inline,\n',
        '        "inline": Inline,\n        "alphabet": Alphabet,\n',
        "from zimage_runner.prompts.csv_file import Csv\n",
        "from zimage_runner.prompts.alphabet import Alphabet\nfrom zimage_runner.prompts.csv_file import Csv\n",
    ),
    "conf/prompts/alphabet.yaml": "# Letters: prompts.letters=xyz\ndefaults:\n  - /schema/prompts/alphabet@_here_\n",
}
PICTURE_FORMAT = {
    "zimage_runner/outputs/config.py": (
        '    png = (".png", False, False)\n',
        '    png = (".png", False, False)\n    tiff = (".tiff", False, True)\n',
    ),
    "zimage_runner/outputs/encoders.py": (
        "class Webp(Encoder):",
        '''class Tiff(Encoder):
    """As TIFF, without loss."""

    format = Format.tiff

    def save(self, image: Image.Image, file: BinaryIO, said: Metadata | None, output: Output) -> None:
        image.save(file, "TIFF", compression="tiff_lzw", exif=exif(said))


class Webp(Encoder):''',
    ),
    "zimage_runner/outputs/metadata.py": ('READABLE = ("PNG", ', 'READABLE = ("PNG", "TIFF", '),
}
ADDITIONS = {"memory policy": MEMORY_POLICY, "prompt source": PROMPT_SOURCE, "picture format": PICTURE_FORMAT}

DRIVER = """
import contextlib, glob, importlib, io, json, sys, zimage_runner
results = []
for module, *words in json.load(sys.stdin):
    words = [name for word in words for name in (glob.glob(word) if "*" in word else [word])]
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = importlib.import_module(module).main(words)
    results.append((code, out.getvalue(), err.getvalue()))
print(json.dumps([zimage_runner.__file__, results]))
"""
"""Many command lines in one process of the copy; words with a star name files."""
RUN, COLLECT, REPRODUCE = "zimage_runner.cli.main", "zimage_runner.collect.__main__", "zimage_runner.reproduce"
QUICK = ("seeds=7", "sampling.num_inference_steps=1")
LETTERS = ("prompts=alphabet", "prompts.letters=xyz", "prompts.offset=1", *QUICK)


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the package with all three additions."""
    folder = tmp_path_factory.mktemp("package")
    shutil.copytree(ROOT / "conf", folder / "conf")
    shutil.copytree(ROOT / "zimage_runner", folder / "zimage_runner", ignore=lambda _, names: {"assets"} & {*names})
    (folder / "zimage_runner" / "assets").symlink_to(ROOT / "zimage_runner" / "assets")
    for files in ADDITIONS.values():
        for name, change in files.items():
            apply(folder / name, change)
    return folder


def apply(path: Path, change: str | tuple[str, ...]) -> None:
    """Write a new file, or replace each text that stands in the file once by the one after it."""
    if isinstance(change, str):
        assert not path.exists()
        path.write_text(change, encoding="utf-8")
        return
    text = path.read_text(encoding="utf-8")
    for old, new in zip(change[::2], change[1::2], strict=True):
        assert text.count(old) == 1, (path, old)
        text = text.replace(old, new)
    path.write_text(text, encoding="utf-8")


def run(package: Path, folder: Path, *commands: tuple[str, ...]) -> list[tuple[int, str, str]]:
    """Run command lines, each a module and its words, in one process: exit code, stdout and stderr of each."""
    done = subprocess.run(
        [sys.executable, "-c", DRIVER],
        input=json.dumps(commands),
        capture_output=True,
        text=True,
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(package)},
        timeout=240,
        encoding="utf-8",
    )
    assert done.returncode == 0, done.stderr
    where, results = json.loads(done.stdout)
    assert Path(where).is_relative_to(package)
    return [tuple(result) for result in results]


@pytest.mark.parametrize("what", ADDITIONS)
def test_the_page_names_the_files(what: str) -> None:
    """At most three files; those that exist already are the ones that the page names."""
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    (row,) = [line for line in page.splitlines() if line.startswith(f"| a {what} |")]
    assert len(ADDITIONS[what]) <= MOST_FILES
    for name in ADDITIONS[what]:
        if (ROOT / name).exists():
            assert f"`{name.removeprefix('zimage_runner/')}`" in row
        else:
            assert f"`{Path(name).parent.as_posix().removeprefix('zimage_runner/')}/" in row


def test_one_of_each_is_used_end_to_end(copy: Path, tmp_path: Path) -> None:
    drawn, resumed, collected, again, usual, refused, negative = run(
        copy,
        tmp_path,
        (RUN, "memory=frugal", "memory.spare_gb=2", "output.format=tiff", "name=new", *LETTERS),
        (RUN, "resume=latest", "verify=true"),
        (COLLECT, "outputs/new", "into=all"),
        (REPRODUCE, "outputs/new/*/items/*_z/*/image.tiff"),
        (RUN, "name=usual", *LETTERS),
        (RUN, "memory=frugal", "engine=diffusers", *LETTERS),
        (RUN, "memory=frugal", "memory.spare_gb=-1", *LETTERS),
    )
    assert (drawn[0], usual[0]) == (0, 0), (drawn, usual)
    images = sorted(tmp_path.glob("outputs/new/*/items/*/*/image.*"))
    expected = sorted(tmp_path.glob("outputs/usual/*/items/*/*/image.png"))
    names = ["00001_the_letter_y/seed_7/image.tiff", "00002_the_letter_z/seed_7/image.tiff"]
    assert [image.relative_to(image.parents[2]).as_posix() for image in images] == names
    for image, png in zip(images, expected, strict=True):
        with Image.open(image) as one, Image.open(png) as other:
            assert one.format == "TIFF"
            assert one.tobytes() == other.tobytes()
    assert (resumed[0], "nothing to draw: 2 pictures are done" in resumed[2]) == (0, True), resumed
    assert (collected[0], len(list((tmp_path / "all").glob("*.tiff")))) == (0, 2), collected
    assert (again[0], again[1].endswith("image.tiff: identical\n")) == (0, True), again
    assert (refused[0], "memory=frugal is not for engine=diffusers" in refused[2]) == (2, True)
    assert (negative[0], "memory.spare_gb=-1.0 is negative: use 0 or more" in negative[2]) == (2, True)
