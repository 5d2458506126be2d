"""Caption features on disk: found again, never confused, bounded, and no trouble when damaged."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from zimage_runner.embedding_cache import EmbeddingCache, EmbeddingCacheConfig
from zimage_runner.errors import UserError

torch = pytest.importorskip("torch")


def cache(path: Path, max_gb: float = 1.0, **identity: str) -> EmbeddingCache:
    return EmbeddingCache(EmbeddingCacheConfig(path=str(path), max_gb=max_gb), {"weights": "w", **identity})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_features_come_back_bit_by_bit(tmp_path, dtype):
    embeds = torch.randn(7, 16).to(dtype)
    cache(tmp_path).put("一只猫", 512, embeds)
    found = cache(tmp_path).get("一只猫", 512, "cpu")
    assert found is not None
    assert found.dtype is dtype
    assert torch.equal(found, embeds)


def test_everything_that_decides_them_is_in_the_name(tmp_path):
    cache(tmp_path, dtype="a").put("a cat", 512, torch.ones(1, 1))
    assert cache(tmp_path, dtype="a").get("a cat", 512, "cpu") is not None
    assert cache(tmp_path, dtype="b").get("a cat", 512, "cpu") is None
    assert cache(tmp_path, dtype="a").get("a cat", 256, "cpu") is None
    assert cache(tmp_path, dtype="a").get("a cat ", 512, "cpu") is None


@pytest.mark.parametrize("damage", [b"", b"x" * 40, None])
def test_a_damaged_entry_is_missing_and_goes_away(tmp_path, damage, caplog):
    cache(tmp_path).put("a", 8, torch.randn(64, 64))
    (entry,) = tmp_path.glob("*/*")
    entry.write_bytes(entry.read_bytes()[:500] if damage is None else damage)
    assert cache(tmp_path).get("a", 8, "cpu") is None
    assert not entry.exists()
    assert "encoded again" in caplog.text


def test_the_size_limit_drops_what_was_used_longest_ago(tmp_path):
    limited = cache(tmp_path, max_gb=50e3 / 1e9)
    for n in range(10):
        limited.put(str(n), 8, torch.randn(16, 64))  # 4 KB each
        for age, path in enumerate(sorted(tmp_path.glob("*/*"), key=os.path.getmtime, reverse=True)):
            os.utime(path, (1e9 - age, 1e9 - age))
    assert limited.get("0", 8, "cpu") is not None  # now the freshest
    for n in range(10, 14):
        limited.put(str(n), 8, torch.randn(16, 64))
    assert sum(p.stat().st_size for p in tmp_path.glob("*/*")) <= 50e3
    assert limited.get("0", 8, "cpu") is not None
    assert limited.get("1", 8, "cpu") is None
    assert limited.get("13", 8, "cpu") is not None


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
    from zimage_runner.session import Session

    read_back: list[bool] = []
    real = Session._read_back
    monkeypatch.setattr(Session, "_read_back", lambda *args: read_back.append(real(*args)) or read_back[-1])
    pictures = []
    for _ in range(2):
        code, out, err = cli("prompt=a red apple", "seeds=[1]", "warmup=none", f"embedding_cache.path={tmp_path}/cache")
        assert code == 0, err
        run = Path(out.strip().splitlines()[-1])
        pictures.append(next(run.glob("items/*/*/image.png")).read_bytes())
        assert len(list((tmp_path / "cache").glob("*/*.safetensors"))) == 1
    assert pictures[0] == pictures[1]
    assert read_back == [False, True]
