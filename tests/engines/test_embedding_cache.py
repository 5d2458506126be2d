"""Caption features on disk: found again, never confused, bounded, and no trouble when damaged."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from zimage_runner.engines.embedding_cache import FOLDER, EmbeddingCache, EmbeddingCacheConfig, all_cached
from zimage_runner.errors import UserError
from zimage_runner.sampling import Lora

torch = pytest.importorskip("torch")


def cache(path: Path, max_gb: float = 1.0, **identity: str) -> EmbeddingCache:
    return EmbeddingCache(EmbeddingCacheConfig(path=str(path), max_gb=max_gb), {"weights": "w", **identity}, "asked")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_features_come_back_bit_by_bit(tmp_path, dtype):
    embeds = torch.randn(7, 16).to(dtype)
    cache(tmp_path).put(("一只猫", 512), embeds)
    found = cache(tmp_path).get(("一只猫", 512), "cpu")
    assert found is not None
    assert found.dtype is dtype
    assert torch.equal(found, embeds)


def test_everything_that_decides_them_is_in_the_name(tmp_path):
    cache(tmp_path, dtype="a").put(("a cat", 512), torch.ones(1, 1))
    assert cache(tmp_path, dtype="a").get(("a cat", 512), "cpu") is not None
    assert cache(tmp_path, dtype="b").get(("a cat", 512), "cpu") is None
    assert cache(tmp_path, dtype="a").get(("a cat", 256), "cpu") is None
    assert cache(tmp_path, dtype="a").get(("a cat ", 512), "cpu") is None


@pytest.mark.parametrize("damage", [b"", b"x" * 40, None])
def test_a_damaged_entry_is_missing_and_goes_away(tmp_path, damage, caplog):
    cache(tmp_path).put(("a", 8), torch.randn(64, 64))
    (entry,) = (tmp_path / FOLDER).glob("??/*")
    entry.write_bytes(entry.read_bytes()[:500] if damage is None else damage)
    assert cache(tmp_path).get(("a", 8), "cpu") is None
    assert not entry.exists()
    assert "encoded again" in caplog.text


def test_the_size_limit_drops_what_was_used_longest_ago(tmp_path):
    limited = cache(tmp_path, max_gb=50e3 / 1e9)
    for n in range(10):
        limited.put((str(n), 8), torch.randn(16, 64))  # 4 KB each
        for age, path in enumerate(sorted((tmp_path / FOLDER).glob("??/*"), key=os.path.getmtime, reverse=True)):
            os.utime(path, (1e9 - age, 1e9 - age))
    assert limited.get(("0", 8), "cpu") is not None  # now the freshest
    for n in range(10, 14):
        limited.put((str(n), 8), torch.randn(16, 64))
    assert sum(p.stat().st_size for p in (tmp_path / FOLDER).glob("??/*")) <= 50e3
    assert limited.get(("0", 8), "cpu") is not None
    assert limited.get(("1", 8), "cpu") is None
    assert limited.get(("13", 8), "cpu") is not None


@pytest.mark.parametrize(
    ("fields", "expected"),
    [({"path": " "}, "embedding_cache.path='' is empty"), ({"max_gb": 0}, "embedding_cache.max_gb=0 is out of range")],
)
def test_bad_fields(fields, expected):
    with pytest.raises(UserError, match=expected):
        EmbeddingCacheConfig(**fields)


def test_a_file_in_the_way(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"embedding_cache\.path=.*file cannot be made"):
        cache(tmp_path / "file")


def test_a_second_run_encodes_nothing_and_draws_the_same(cli, tmp_path, monkeypatch):
    from zimage_runner.engines.caption_features import CaptionFeatures

    read_back: list[bool] = []
    real = CaptionFeatures._read_back
    monkeypatch.setattr(CaptionFeatures, "_read_back", lambda *args: read_back.append(real(*args)) or read_back[-1])
    pictures = []
    for _ in range(2):
        code, out, err = cli(
            "prompt=a red apple",
            "seeds=[1]",
            "warmup=none",
            "sampling.num_inference_steps=2",
            f"embedding_cache.path={tmp_path}/cache",
        )
        assert code == 0, err
        run = Path(out.strip().splitlines()[-1])
        pictures.append(next(run.glob("items/*/*/image.png")).read_bytes())
        assert len(list((tmp_path / "cache").glob("*/*/*.safetensors"))) == 1
    assert pictures[0] == pictures[1]
    assert read_back == [False, True]


def test_what_is_there_is_foreseen(tmp_path):
    config = EmbeddingCacheConfig(path=str(tmp_path))
    texts = [("a cat", 512), ("a dog", 512)]
    assert not all_cached(EmbeddingCacheConfig(), "asked", texts)
    assert not all_cached(config, "asked", texts)
    for n, (text, length) in enumerate(texts):
        assert all_cached(config, "asked", texts) is False
        cache(tmp_path).put((text, length), torch.full((1, 1), n))
    assert all_cached(config, "asked", texts)
    assert not all_cached(config, "something else", texts)
    assert not all_cached(config, "asked", [*texts, ("a cat", 256)])
    cache(tmp_path, versions="newer")
    assert not all_cached(config, "asked", texts)


@pytest.mark.parametrize("engine", ["native", "auto", "diffusers"])
def test_a_run_whose_captions_are_cached_loads_no_text_encoder(engine, cli, tmp_path, monkeypatch):
    from zimage_runner.engines.native import engine as native

    loaded: list[object] = []
    load = native.load_text_encoder
    monkeypatch.setattr(native, "load_text_encoder", lambda *args: loaded.append(args) or load(*args))
    options = [
        f"engine={engine}",
        "seeds=[1]",
        "sampling.num_inference_steps=2",
        f"embedding_cache.path={tmp_path}/cache",
    ]
    pictures = []
    for prompt in ("a red apple", "a red apple", "a green apple"):
        code, out, err = cli(f"prompt={prompt}", *options)
        assert code == 0, err
        pictures.append(next(Path(out.strip().splitlines()[-1]).glob("items/*/*/image.png")).read_bytes())
    assert pictures[0] == pictures[1] != pictures[2]
    assert len(loaded) == (0 if engine == "diffusers" else 2)  # not for the second run


def test_a_wrong_guess_costs_the_loading_and_nothing_else(cli, tmp_path, monkeypatch):
    from zimage_runner import session

    monkeypatch.setattr(session, "all_cached", lambda *args: True)
    code, _, err = cli(
        "prompt=a red apple", "seeds=[1]", "sampling.num_inference_steps=1", f"embedding_cache.path={tmp_path}/cache"
    )
    assert code == 0, err


def test_a_damaged_guess_is_none(tmp_path):
    config = EmbeddingCacheConfig(path=str(tmp_path))
    cache(tmp_path).put(("a cat", 512), torch.ones(1, 1))
    (guess,) = tmp_path.glob("*/identities/*")
    guess.write_bytes(b"\xff{")
    assert not all_cached(config, "asked", [("a cat", 512)])
    cache(tmp_path)
    assert all_cached(config, "asked", [("a cat", 512)])


def test_what_was_written_last_stays_where_all_is_of_one_moment(tmp_path, monkeypatch):
    """The clock of a file system ticks every few milliseconds."""
    limited = cache(tmp_path, max_gb=6e3 / 1e9)
    entries = limited._entries
    monkeypatch.setattr(limited, "_entries", lambda: [(0.0, size, name) for _, size, name in entries()])
    for n in range(9):
        limited.put((str(n), 8), torch.randn(16, 64))
        assert limited.get((str(n), 8), "cpu") is not None


OWN = "a" * 64 + ".safetensors"


def users_files(path: Path) -> dict[Path, bytes]:
    """What lay in the directory before, and what somebody put into the cache's own folders."""
    names = [
        "notes.txt",
        "aa/film.mp4",
        f"aa/{OWN}",
        f"{FOLDER}/notes.txt",
        f"{FOLDER}/aa/film.mp4",
        f"{FOLDER}/ab/{OWN}",
    ]
    files = {path / name: name.encode() * 1000 for name in names}
    for file, data in files.items():
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(data)
    return files


def test_nothing_of_the_users_is_counted_or_deleted(tmp_path):
    cache(tmp_path)  # makes and marks its folder
    files = users_files(tmp_path)
    (tmp_path / "film").mkdir()
    elsewhere = tmp_path / "film" / ("cc" + "0" * 62 + ".safetensors")
    elsewhere.write_bytes(b"x" * 9000)
    (tmp_path / FOLDER / "cc").symlink_to(tmp_path / "film")  # a linked folder
    (tmp_path / FOLDER / "aa" / OWN).symlink_to(elsewhere)
    os.mkfifo(tmp_path / FOLDER / "aa" / ("a" * 63 + "b.safetensors"))
    limited = cache(tmp_path, max_gb=6e3 / 1e9)
    assert limited._size == 0
    for n in range(5):
        limited.put((str(n), 8), torch.randn(16, 64))
    assert 4e3 < limited._size <= 6e3  # one entry, the last
    assert limited.get(("4", 8), "cpu") is not None
    assert {file: file.read_bytes() for file in files} == files
    assert elsewhere.read_bytes() == b"x" * 9000


def test_what_killed_processes_left_is_counted_and_goes_first(tmp_path):
    limited = cache(tmp_path, max_gb=6e3 / 1e9)
    left = tmp_path / FOLDER / "aa" / f"{'a' * 64}.01234567.tmp"
    left.parent.mkdir()
    left.write_bytes(b"x" * 5000)
    os.utime(left, (1e9, 1e9))
    assert cache(tmp_path)._size == 5000
    limited.put(("a", 8), torch.randn(16, 64))
    cache(tmp_path, max_gb=6e3 / 1e9).put(("b", 8), torch.randn(1, 1))
    assert not left.exists()


def test_a_folder_of_that_name_that_is_somebody_elses_is_refused(tmp_path):
    (tmp_path / FOLDER).mkdir()
    (tmp_path / FOLDER / "film.mp4").write_bytes(b"x")
    with pytest.raises(UserError, match=r"holds other things and no CACHEDIR\.TAG: name another directory$"):
        cache(tmp_path)
    (tmp_path / FOLDER / "film.mp4").unlink()
    cache(tmp_path)
    assert (
        (tmp_path / FOLDER / "CACHEDIR.TAG").read_bytes().startswith(b"Signature: 8a477f597d28d172789f06886806bc55\n")
    )


def test_the_directory_may_be_a_link_and_its_folder_may_not(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    cache(tmp_path / "link").put(("a", 8), torch.ones(1, 1))
    assert cache(tmp_path / "real").get(("a", 8), "cpu") is not None
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / FOLDER).symlink_to(tmp_path / "real")
    with pytest.raises(UserError, match=f"{FOLDER} is a link"):
        cache(tmp_path / "other")
    assert not all_cached(EmbeddingCacheConfig(path=str(tmp_path / "other")), "asked", [("a", 8)])


@pytest.mark.parametrize("kind", ["link", "fifo", "folder"])
def test_an_entry_that_is_no_plain_file_is_missing_and_left_alone(tmp_path, kind, caplog):
    here = cache(tmp_path / "c")
    here.put(("a", 8), torch.ones(2, 2))
    (entry,) = (tmp_path / "c" / FOLDER).glob("??/*")
    entry.rename(tmp_path / "moved")
    {"link": lambda: entry.symlink_to(tmp_path / "moved"), "fifo": lambda: os.mkfifo(entry), "folder": entry.mkdir}[
        kind
    ]()
    before, data = os.lstat(entry), (tmp_path / "moved").read_bytes()
    assert here.get(("a", 8), "cpu") is None
    here.put(("a", 8), torch.zeros(2, 2))
    assert (tmp_path / "moved").read_bytes() == data
    if kind != "link":  # a link of the entry's name is replaced by the entry
        assert os.path.samestat(before, os.lstat(entry))
        assert "cannot write" in caplog.text


def test_every_flipped_bit_costs_the_entry_and_nothing_else(tmp_path, caplog):
    """Without a checksum, another picture would be drawn with the same fingerprint."""
    here, embeds = cache(tmp_path), torch.randn(3, 4).to(torch.bfloat16)
    here.put(("a", 8), embeds)
    (entry,) = (tmp_path / FOLDER).glob("??/*")
    good = entry.read_bytes()
    for place in range(len(good)):
        bad = bytearray(good)
        bad[place] ^= 1 << place % 8
        entry.write_bytes(bad)
        found = here.get(("a", 8), "cpu")
        assert found is None or (found.dtype is embeds.dtype and torch.equal(found, embeds)), place
        assert entry.exists() == (found is not None)
    for place in range(len(good) - embeds.numel() * 2, len(good)):
        bad = bytearray(good)
        bad[place] ^= 1 << place % 8
        entry.write_bytes(bad)
        caplog.clear()
        assert here.get(("a", 8), "cpu") is None
        assert len(caplog.records) == 1
        assert "checksum does not match" in caplog.text
    here.put(("a", 8), embeds)
    found = here.get(("a", 8), "cpu")
    assert found is not None
    assert torch.equal(found, embeds)


def test_an_entry_under_another_ones_name_is_wrong(tmp_path):
    here = cache(tmp_path)
    here.put(("a", 8), torch.ones(2, 2))
    (entry,) = (tmp_path / FOLDER).glob("??/*")
    other = tmp_path / FOLDER / here._name(("b", 8))
    other.parent.mkdir(exist_ok=True)
    entry.rename(other)
    assert here.get(("b", 8), "cpu") is None
    assert not other.exists()


def test_adapters_of_the_text_encoder_are_part_of_the_name(tmp_path):
    half, whole = (Lora(digest="d", weight=weight, name="a", path="a", hash="h", encodes=True) for weight in (0.5, 1.0))
    cache(tmp_path).put(("a", 8, half), torch.ones(1, 1))
    assert cache(tmp_path).get(("a", 8, half), "cpu") is not None
    for other in (("a", 8), ("a", 8, whole), ("a", 8, half, whole)):
        assert cache(tmp_path).get(other, "cpu") is None
