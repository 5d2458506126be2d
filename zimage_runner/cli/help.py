"""The text of --help: every option of every group with the first line of its file. Imports neither Hydra nor torch.

Hydra's own listing copies every schema once a group, which takes seconds.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

PACKAGE = Path(__file__).resolve().parent.parent
# conf/ lies inside the package in a wheel and beside it in a checkout or an editable install.
CONFIG_DIR = next(d for d in (PACKAGE / "conf", PACKAGE.parent / "conf") if d.is_dir())

HEAD = """\
zimage_runner: batches of pictures with Z-Image-Turbo - prompts x seeds, loaded and warmed once.

  python -m zimage_runner +experiment=NAME [group=option] [field=value]     (-m: sweep comma-separated values)
  python -m zimage_runner prompt="a cat" output_file=cat.png

Config groups, as group=option (experiments as +experiment=NAME):
"""
TAIL = """
Every field can be set on the command line, such as sampling.height=512 or seeds="0-9".
  The fields of a group:   --help prompts          (or --help prompts=csv)
  Fields of the run:       --help run              (prompt, seeds, output_file, resume, dry_run ...)
  The composed config:     --cfg job
  The plan, no drawing:    dry_run=true
  Your own experiments:    --config-dir my_conf +experiment=mine
  Experiments of others:   are data; those that name code need --trust-code as well
  Finish a run:            resume=latest           (or resume=RUN_DIRECTORY)
  Draw a picture again:    python -m zimage_runner.reproduce IMAGE.png
  Pictures in one folder:  python -m zimage_runner.collect RUN into=FOLDER    (or sheet=FILE.png)
  Hydra's own options:     --hydra-help
"""


def help_text(argv: Sequence[str]) -> str:
    """What --help prints; options of a --config-dir on the same command line included.

    With the name of a group beside it: that group's fields, for which the schemas (and with them Hydra) are imported.
    """
    words = [word for word in argv if word.partition("=")[0].isidentifier()]
    if words:
        from zimage_runner.cli.help_fields import fields_text, is_group

        if groups := [word for word in words if is_group(word)]:
            return fields_text(groups) + "\n"
    lines = []
    for group in sorted({path.parent.name for root in config_dirs(argv) for path in root.glob("*/*.yaml")}):
        lines.append(f"\n  {group}")
        lines += [f"    {name:<20} {description}".rstrip() for name, description in _options(group, argv)]
    return HEAD + "\n".join(lines).lstrip("\n") + "\n" + TAIL


def config_dirs(argv: Sequence[str]) -> list[Path]:
    """``conf/`` and what --config-dir adds to it."""
    roots = [CONFIG_DIR]
    for position, word in enumerate(argv):
        if word.startswith("--config-dir="):
            roots.append(Path(word.partition("=")[2]))
        elif word in ("--config-dir", "-cd") and position + 1 < len(argv):
            roots.append(Path(argv[position + 1]))
    return roots


def _options(group: str, argv: Sequence[str]) -> Iterator[tuple[str, str]]:
    for path in sorted(path for root in config_dirs(argv) for path in (root / group).glob("*.yaml")):
        comments = [line for line in path.read_text(encoding="utf-8").splitlines() if line.startswith("# ")]
        described = [line[2:] for line in comments if not line.startswith("# @package")]
        yield path.stem, described[0] if described else ""
