"""Draw pictures larger from themselves: enlarged, then drawn anew with their own prompt at a low strength.

    python -m zimage_runner enlarge PICTURE|RUN... [scale=2] [strength=0.15] [starred=true] [group=option] [field=value]

PICTURE   a picture of this or another program, or any picture with its prompt in the .txt beside it
RUN       a run directory, a folder of runs, or latest: all of its pictures
scale     how many times as wide and high
strength  how much is drawn anew: 0.1 sharpens, 0.4 invents details; all steps are taken whatever it is
starred   true: of runs, only pictures that were starred in the gallery

What is larger than the model draws well (2048 pixels, 128 for the embedded model) is drawn in overlapping tiles;
sampling.tile sets their side. Everything else is the run's: model=, name=, output.root=, dry_run=true ... Its records
say what each came from.
"""

from __future__ import annotations

from collections.abc import Sequence, Set
from dataclasses import replace
from pathlib import Path

from zimage_runner.cli.chosen import Fields, number, run_from
from zimage_runner.prompts.folder import Folder
from zimage_runner.prompts.prompt import Prompt

SEED = 42
"""Of pictures that do not say theirs."""


def main(argv: Sequence[str]) -> int:
    """Run one command line and return its exit code."""
    return run_from(argv, __doc__ or "", "enlarged", ("scale", "strength"), _larger)


def _larger(file: Path, fields: Fields, _: Set[str]) -> Prompt:
    """The prompt that draws a picture larger from itself. Raises UserError."""
    prompt = Folder(path=str(file)).prompt(file)
    return replace(
        prompt,
        id=None,
        seeds=prompt.seeds or (SEED,),
        overrides={
            **prompt.overrides,
            "scale": number(fields, "scale", 2, 1, 16),
            "strength": number(fields, "strength", 0.15, 0.01, 1),
            "steps_after_strength": True,
        },
        metadata={**prompt.metadata, "enlarged_from": str(file.absolute())},
    )
