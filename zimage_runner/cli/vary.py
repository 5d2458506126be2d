"""Draw neighbours of pictures: near in the noise that they were drawn from, or near in what they show.

    python -m zimage_runner vary PICTURE|RUN... [n=4] [amount=0.4] [starred=true] [group=option] [field=value ...]
    python -m zimage_runner vary PICTURE|RUN... strength=0.3 [n=4] [starred=true] [group=option] [field=value ...]

PICTURE   a picture of this program, or of one that writes its seed and prompt into the file
RUN       a run directory, a folder of runs, or latest: all of its pictures
n         neighbours of each
amount    how far the noise goes from the picture's own (0) to another seed's (1): same prompt, same settings
strength  start from the picture itself instead (img2img), also from one that no program drew: its prompt is in the
          .txt beside it
starred   true: of runs, only pictures that were starred in the gallery

Everything else is the run's: model=, name=, output.root=, dry_run=true ... Its records say what each came from.
"""

from __future__ import annotations

from collections.abc import Sequence, Set
from dataclasses import replace
from pathlib import Path

from zimage_runner.cli.chosen import Fields, number, run_from
from zimage_runner.errors import UserError
from zimage_runner.prompts.folder import Folder
from zimage_runner.prompts.images import prompt_of_picture
from zimage_runner.prompts.prompt import Prompt
from zimage_runner.prompts.text import shown

MOST = 1000


def main(argv: Sequence[str]) -> int:
    """Run one command line and return its exit code."""
    return run_from(argv, __doc__ or "", "varied", ("n", "amount", "strength"), _neighbours)


def _neighbours(file: Path, fields: Fields, typed: Set[str] = frozenset()) -> Prompt:
    """The prompt whose seeds are the picture's neighbours. Raises UserError."""
    count = number(fields, "n", 4, 1, MOST)
    if count != int(count):
        raise UserError(f"n={fields['n']}: write a whole number")
    if "strength" in fields:
        if "amount" in fields:
            raise UserError("amount and strength are two ways to vary a picture: keep one")
        prompt = Folder(path=str(file)).prompt(file)
        overrides = {**prompt.overrides, "strength": number(fields, "strength", 0.3, 0.01, 1)}
    else:
        prompt = prompt_of_picture(file, moved=typed)
        if not prompt.seeds:
            raise UserError(f"{shown(file)} does not say its seed: strength=0.3 starts from the picture itself")
        overrides = {
            **prompt.overrides,
            "variation_seed": prompt.overrides.get("variation_seed", prompt.seeds[0]),
            "variation": number(fields, "amount", 0.4, 0, 1),
        }
    first = (prompt.seeds or (0,))[0]
    return replace(
        prompt,
        id=None,
        seeds=tuple(first + n for n in range(1, int(count) + 1)),
        overrides=overrides,
        metadata={**prompt.metadata, "varied_from": str(file.absolute())},
    )
