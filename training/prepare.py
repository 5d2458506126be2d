"""Download the pictures and their names, keep the ones to learn, pack them: `python -m training.prepare`.

Pictures: npm `@lobehub/fluent-emoji-3d` (Microsoft Fluent Emoji, MIT). Names: npm `emojibase-data` (MIT; Unicode CLDR).
Flags, gendered and family variants, keycaps and most clock faces are left out.
"""

from __future__ import annotations

import io
import json
import re
import subprocess
import tarfile
from pathlib import Path
from typing import Any

from PIL import Image

from training.config import TrainingConfig, command

PACKAGES = {
    "@lobehub/fluent-emoji-3d@1.1.0": "lobehub-fluent-emoji-3d-1.1.0.tgz",
    "emojibase-data@17.0.0": "emojibase-data-17.0.0.tgz",
}
SHORTCODES = ("cldr", "emojibase", "github")
SIDE = 256
PEOPLE, COMPONENTS, SYMBOLS, FLAGS = 1, 2, 8, 9


def download(folder: Path) -> tuple[Path, Path]:
    """Fetch both npm tarballs unless they are there; return (pictures, names)."""
    folder.mkdir(parents=True, exist_ok=True)
    for package, file in PACKAGES.items():
        if not (folder / file).exists():
            subprocess.run(["npm", "pack", package], cwd=folder, check=True, stdout=subprocess.DEVNULL)
    pictures, names = (folder / file for file in PACKAGES.values())
    return pictures, names


def read_json(names: tarfile.TarFile, path: str) -> Any:
    """One JSON file of the emojibase package."""
    member = names.extractfile(f"package/{path}")
    assert member is not None
    return json.load(member)


def hex_key(code: str) -> str:
    """Code points without the emoji variation selector, as the picture files are named."""
    return "-".join(part for part in code.upper().split("-") if part != "FE0F")


def wanted(entry: dict[str, Any], subgroup: str) -> bool:
    """Whether an emoji is distinct and drawable enough to be learnt."""
    label, group = entry["label"], entry.get("group")
    if group is None or group == COMPONENTS:
        return False
    if group == PEOPLE:
        if label in ("man dancing", "woman dancing", "man", "woman", "men holding hands"):
            return True
        variants = r"(man|woman|men|women)[ :]|family:|couple with heart:|kiss:|person:|deaf"
        duplicate_gesture = label.startswith("person ") and subgroup == "person-gesture" and entry["order"] % 2
        return not (re.match(variants, label) or "facing right" in label or duplicate_gesture)
    if group == FLAGS:
        return not label.startswith("flag:")
    if "o’clock" in label or "-thirty" in label:
        return label.startswith(("twelve", "three o", "ten o"))
    if group == SYMBOLS:
        if label.startswith(
            ("keycap", "Japanese", "white small", "black small", "white medium", "black medium", "large")
        ):
            return False
        return "button" not in label or subgroup == "av-symbol"
    return True


def shortcodes(names: tarfile.TarFile) -> dict[str, list[str]]:
    """English short names of each emoji, as plain words."""
    found: dict[str, set[str]] = {}
    for source in SHORTCODES:
        for code, values in read_json(names, f"en/shortcodes/{source}.json").items():
            for value in [values] if isinstance(values, str) else values:
                words = re.sub(r"[_-]", " ", value).strip().lower()
                if re.fullmatch(r"[a-z ']{3,40}", words):
                    found.setdefault(code, set()).add(words)
    return {code: sorted(values) for code, values in found.items()}


def pack(pictures_tgz: Path, names_tgz: Path, out: Path) -> int:
    """Write `pictures.tar` (one WebP each, 256x256 RGBA) and `pictures.json`; return how many."""
    out.mkdir(parents=True, exist_ok=True)
    entries: list[dict[str, Any]] = []
    with tarfile.open(names_tgz) as names, tarfile.open(pictures_tgz) as pictures:
        english, chinese = read_json(names, "en/data.json"), read_json(names, "zh/data.json")
        subgroups = {s["order"]: s["key"] for s in read_json(names, "en/messages.json")["subgroups"]}
        zh_by_code, codes = {e["hexcode"]: e for e in chinese}, shortcodes(names)
        files = {hex_key(Path(m.name).stem): m for m in pictures.getmembers() if m.name.endswith(".webp")}
        with tarfile.open(out / "pictures.tar", "w") as tar:
            for entry in english:
                member, subgroup = files.get(hex_key(entry["hexcode"])), subgroups.get(entry.get("subgroup"), "")
                if member is None or not wanted(entry, subgroup):
                    continue
                source = pictures.extractfile(member)
                assert source is not None
                add_picture(tar, f"{len(entries):04d}.webp", Image.open(source))
                zh = zh_by_code.get(entry["hexcode"], {})
                entries.append({
                    "code": entry["hexcode"], "emoji": entry["emoji"], "label": entry["label"],
                    "tags": entry.get("tags", []),
                    "label_zh": zh.get("label", ""), "tags_zh": zh.get("tags", []), "group": entry["group"],
                    "subgroup": subgroup, "shortcodes": codes.get(entry["hexcode"], []),
                })  # fmt: skip
    (out / "pictures.json").write_text(json.dumps(entries, ensure_ascii=False), encoding="utf-8")
    return len(entries)


def add_picture(tar: tarfile.TarFile, name: str, image: Image.Image) -> None:
    """Add one picture, brought to 256x256 RGBA, with a fixed time stamp."""
    image = image.convert("RGBA")
    if image.size != (SIDE, SIDE):
        image = image.resize((SIDE, SIDE), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    image.save(buffer, "WEBP", quality=92, method=4)
    info = tarfile.TarInfo(name)
    info.size = buffer.tell()
    buffer.seek(0)
    tar.addfile(info, buffer)


def main(cfg: TrainingConfig) -> None:
    """Download and pack."""
    pictures, names = download(Path(cfg.data.downloads))
    count = pack(pictures, names, Path(cfg.data.packed))
    print(f"packed {count} pictures into {cfg.data.packed}")


if __name__ == "__main__":
    command(main)
