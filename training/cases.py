"""Evaluation cases and reference pictures, made once and committed: `python -m training.cases`.

`reference/cases.jsonl`: one prompt a line with the pictures that count as right. `reference/pictures.webp`: all
training pictures at 48x48 RGBA. `reference/pictures.json`: their emoji, labels and whether they may be mirrored.
"""

from __future__ import annotations

import json
import random
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from training.captions import COLORS, CaptionWriter, held_back, with_article
from training.config import TrainingConfig, command
from training.lexicon import colors, held_out, phrases
from training.names import Picture, load_pictures, sharing
from training.render import load_rgba
from training.retrieval import SIDE, thumbnails
from training.scenes import SceneWriter

COLUMNS = 37
EACH = 300  # label cases a language
FRESH = 120  # cases a language of the later phrasings
POPULAR_ONLY = 100  # coloured and pair cases


@dataclass(slots=True)
class Case:
    """A prompt. `right` holds one list of picture indices a thing; `tint` is the colour asked for, -1 for none.

    `phrasing` is the held-out phrasing's place in heldout.yaml, -1 for none.
    """

    set: str
    prompt: str
    right: list[list[int]] = field(default_factory=list)
    tint: int = -1
    phrasing: int = -1

    @property
    def templates(self) -> list[str]:
        """The held-out phrasings of the case's set; empty if it has none."""
        return held_out(phrasings_of(self.set)) if self.phrasing >= 0 else []


def phrasings_of(name: str) -> str:
    """The key in heldout.yaml of a set's phrasings: `en_unread_alias` uses those of `en_unread`, `en_alias` of `en`."""
    return name.removesuffix("_alias").removesuffix("_label")


class CaseWriter:
    """Draws evaluation cases from a fixed seed."""

    def __init__(self, pictures: list[Picture], seed: int) -> None:
        self.pictures, self.rng = pictures, random.Random(f"{seed} cases")
        self.popular = [p for p in pictures if p.popular and p.group != 8]

    def phrase(self, noun: str, zh: bool) -> str:
        """The noun with an article or a measure word, three in ten with an adjective."""
        rng, p = self.rng, phrases("zh" if zh else "en")
        if rng.random() < 0.3:
            noun = rng.choice(p.adjectives) + ("" if zh else " ") + noun
        return rng.choice(p.determiners) + noun if zh else with_article(rng.choice(["a", "a", "a", "the"]), noun)

    def held_out_phrasing(self, name: str, k: int, zh: bool, templates: list[str]) -> str:
        """The k-th held-out phrasing, filled."""
        return templates[k % len(templates)].replace("{np}", self.phrase(name, zh)).replace("{n}", name)

    def named(self, title: str, chosen: list[tuple[Picture, str]], zh: bool) -> list[Case]:
        """Cases of one held-out set."""
        templates = held_out(phrasings_of(title))
        return [
            Case(
                title,
                self.held_out_phrasing(n, k, zh, templates),
                [sharing(self.pictures, n)],
                phrasing=k % len(templates),
            )
            for k, (_, n) in enumerate(chosen)
        ]

    def all(self) -> list[Case]:
        """Every case, set by set."""
        rng, sample = self.rng, self.rng.sample(self.pictures, min(EACH, len(self.pictures)))
        aliased = [(p, rng.choice(p.aliases)) for p in self.popular if p.aliases]
        aliased_zh = [(p, rng.choice(p.aliases_zh)) for p in self.popular if p.aliases_zh]
        cases = self.named("en_label", [(p, p.label) for p in sample], zh=False)
        cases += self.named("en_alias", aliased, zh=False)
        cases += self.named("zh_label", [(p, p.label_zh) for p in sample if p.label_zh], zh=True)
        cases += self.named("zh_alias", aliased_zh, zh=True)
        cases += [Case("bare", p.label, [sharing(self.pictures, p.label)]) for p in sample[:200]]
        return cases + self.colored() + self.pairs() + self.fresh() + self.unread()

    def fresh(self) -> list[Case]:
        """Phrasings written after the first released weights, for the next ones: their own draw of pictures."""
        self.rng = random.Random("fresh")
        chosen = [self.rng.sample([p for p in self.pictures if p.label_zh], FRESH) for _ in range(2)]
        english = self.named("en_fresh", [(p, p.label) for p in chosen[0]], zh=False)
        return english + self.named("zh_fresh", [(p, p.label_zh) for p in chosen[1]], zh=True)

    def unread(self) -> list[Case]:
        """Phrasings written before word marks were trained: names, and every popular picture by an everyday name."""
        self.rng = random.Random("unread")
        cases = []
        for language in ("en", "zh"):
            zh = language == "zh"
            chosen = self.rng.sample([p for p in self.pictures if p.label_zh], FRESH)
            cases += self.named(f"{language}_unread", [(p, p.label_zh if zh else p.label) for p in chosen], zh)
            aliases = [(p, p.aliases_zh if zh else p.aliases) for p in self.popular]
            named = [(p, self.rng.choice(names)) for p, names in aliases if names]
            self.rng.shuffle(named)
            cases += self.named(f"{language}_unread_alias", named[:FRESH], zh)
        return cases

    def colored(self) -> list[Case]:
        """Combinations of a colour and a thing that training holds back, half of them in Chinese."""
        scenes = SceneWriter(CaptionWriter(self.pictures, self.rng))
        found = []
        for p in self.popular:
            for tint, name in enumerate(COLORS):
                nouns, nouns_zh = p.plain_nouns, p.plain_nouns_zh
                clash = any(f"{name} {n}" in scenes.taken for n in nouns)
                if p.colorable and nouns_zh and held_back(name, p.label) and not clash:
                    found.append((tint, name, nouns[-1], nouns_zh[0]))
        cases = []
        for k, (tint, name, noun, noun_zh) in enumerate(self.rng.sample(found, min(POPULAR_ONLY, len(found)))):
            prompt = f"{colors()[name]['zh']}色的{noun_zh}" if k % 2 else with_article("a", f"{name} {noun}")
            cases.append(Case("colored", prompt, [sharing(self.pictures, noun_zh if k % 2 else noun)], tint))
        return cases

    def pairs(self) -> list[Case]:
        """Pairs that training holds back, half of them in Chinese."""
        cases: list[Case] = []
        while len(cases) < POPULAR_ONLY and len(self.popular) > 30:
            a, b = self.rng.sample(self.popular, 2)
            if not held_back(a.label, b.label):
                continue
            zh = len(cases) % 2 == 1
            x, y = (self.rng.choice(p.nouns_zh if zh else p.nouns) for p in (a, b))
            prompt = f"{x}和{y}" if zh else f"{with_article('a', x)} and {with_article('a', y)}"
            cases.append(Case("pairs", prompt, [sharing(self.pictures, x), sharing(self.pictures, y)]))
        return cases


def save_reference(folder: Path, pictures: list[Picture], thumbs: Tensor) -> None:
    """Write the thumbnails as one WebP mosaic and the names as JSON."""
    rows = -(-len(thumbs) // COLUMNS)
    mosaic = np.zeros((rows * SIDE, COLUMNS * SIDE, 4), np.uint8)
    for i, tile in enumerate(thumbs.permute(0, 2, 3, 1).numpy()):
        r, c = divmod(i, COLUMNS)
        mosaic[r * SIDE : (r + 1) * SIDE, c * SIDE : (c + 1) * SIDE] = tile
    Image.fromarray(mosaic).save(folder / "pictures.webp", quality=92, method=6)
    names = [{"emoji": p.emoji, "label": p.label, "label_zh": p.label_zh, "flippable": p.flippable} for p in pictures]
    (folder / "pictures.json").write_text(json.dumps(names, ensure_ascii=False, indent=0) + "\n", encoding="utf-8")


def load_reference(folder: Path) -> tuple[Tensor, list[dict]]:
    """(uint8 [N, 4, 48, 48], names) of the committed reference."""
    names = json.loads((folder / "pictures.json").read_text(encoding="utf-8"))
    mosaic = torch.from_numpy(np.array(Image.open(folder / "pictures.webp").convert("RGBA")))
    tiles = mosaic.view(-1, SIDE, COLUMNS, SIDE, 4).permute(0, 2, 4, 1, 3).reshape(-1, 4, SIDE, SIDE)
    return tiles[: len(names)].contiguous(), names


def load_cases(folder: Path) -> list[Case]:
    """The committed cases."""
    return [Case(**json.loads(line)) for line in (folder / "cases.jsonl").read_text(encoding="utf-8").splitlines()]


def main(cfg: TrainingConfig) -> None:
    """Write the reference folder."""
    folder = Path(cfg.data.reference)
    folder.mkdir(parents=True, exist_ok=True)
    pictures = load_pictures(Path(cfg.data.packed), cfg.data.limit)
    save_reference(folder, pictures, thumbnails(load_rgba(Path(cfg.data.packed), cfg.data.limit)))
    cases = CaseWriter(pictures, cfg.seed).all()
    lines = [json.dumps(asdict(case), ensure_ascii=False) for case in cases]
    (folder / "cases.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    print(f"{len(cases)} cases, {len(pictures)} pictures in {folder}")


if __name__ == "__main__":
    command(main)
