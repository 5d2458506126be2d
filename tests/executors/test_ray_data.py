"""The Ray Data recipe of docs/scale.md, as it is printed there."""

from __future__ import annotations

import io
import re
from pathlib import Path

import numpy as np
import pyarrow.parquet
import pytest
from PIL import Image

ray = pytest.importorskip("ray", reason="the extra ray is not installed")
pytest.importorskip("pandas", reason="Ray Data needs pandas")

PAGE = Path(__file__).parents[2] / "docs" / "scale.md"


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_two_actors_draw_what_is_not_there_yet(tmp_path: Path) -> None:
    import zimage_runner as zr

    (code,) = [block for block in re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.S)
               if "map_batches" in block]  # fmt: skip
    names: dict[str, object] = {"__name__": "recipe"}
    exec(code, names)
    draw_all = names["draw_all"]
    assert callable(draw_all)
    words = {"model": "zimage_nano", "warmup": "none"}
    rows = [{"id": f"{n}", "prompt": f"a red apple {n // 2}", "seed": n % 2} for n in range(6)]
    ray.init(num_cpus=3, include_dashboard=False, log_to_driver=False)
    try:
        assert draw_all(rows[:4], str(tmp_path / "out"), 2, words, 0) == 4
        assert draw_all(rows, str(tmp_path / "out"), 2, words, 0) == 2
        assert draw_all(rows, str(tmp_path / "out"), 2, words, 0) == 0
    finally:
        ray.shutdown()
    found = pyarrow.parquet.read_table(tmp_path / "out").to_pylist()
    assert sorted(row["id"] for row in found) == [row["id"] for row in rows]
    with zr.load(**words) as model:
        for row in found[:3]:
            expected = model.generate(row["prompt"], seeds=row["seed"])[0].image
            assert np.array_equal(np.asarray(Image.open(io.BytesIO(row["image"]))), np.asarray(expected))
