"""How much memory writing a prepared component takes: ``python written_memory.py FOLDER [packed]`` prints megabytes.

A process of its own, for the peak is the process's; it is counted from when torch is there.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path


def megabytes_to_write(folder: Path, *options: str) -> int:
    """To write 0.6 GB of fp32 packed or not, in a fresh process."""
    command = [sys.executable, __file__, str(folder), *options]
    return int(subprocess.run(command, capture_output=True, text=True, check=True, encoding="utf-8").stdout)


def main(folder: Path, packed: bool) -> None:
    import torch

    import zimage_runner.weights.packed.pack  # noqa: F401
    from zimage_runner.weights.find.layout import Layout
    from zimage_runner.weights.prepared.pieces import plan_component
    from zimage_runner.weights.prepared.prepare import _write_component
    from zimage_runner.weights.safetensors_file import create, read_header

    source = folder / "big.safetensors"
    create(source, {f"layers.{i}.feed_forward.w2.weight": ("F32", (5000, 5000)) for i in range(6)}, {})
    layout = Layout(folder, {"transformer": {}}, {"transformer": [read_header(source)]}, [])
    torch.zeros(8).to(torch.bfloat16)
    before = _memory("VmRSS")
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # forget the peak so far
    plan = plan_component(layout, "transformer")
    _write_component(folder / "out" / "x.safetensors", "transformer", plan, packed=packed)
    print(_memory("VmHWM") - before)


def _memory(field: str) -> int:
    found = re.search(field + r":\s+(\d+) kB", Path("/proc/self/status").read_text(encoding="utf-8"))
    assert found is not None
    return int(found[1]) // 1024


if __name__ == "__main__":
    main(Path(sys.argv[1]), "packed" in sys.argv[2:])
