"""Where the native engine's milliseconds go, in bf16 and in fp8.

    python -m benchmarks.profile_forward out.json --model /data/turbo     # one GPU, about two minutes
    python -m benchmarks.profile_forward out.json       # the embedded model: tries it, also on a CPU, without fp8

Eight forwards of each variant, at the power limit as in a long run; then the milliseconds of each kernel, from a trace.
Random weights of the published sizes: synthetic_checkpoint.py. Predictions and what came of them: profile_notes.md.
"""

from __future__ import annotations

import argparse
import dataclasses
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks import machine
from benchmarks.scenarios import TINY
from zimage_runner.engines.native import sdpa
from zimage_runner.engines.native.assembly import load_model, load_transformer, open_model
from zimage_runner.engines.native.model import NativeModel, Options
from zimage_runner.engines.native.rope import padded_length

STEPS, CAPTION = 8, 32
"""Forwards of a picture, and tokens of a short caption."""
LARGEST = 16
"""Kernels in a table."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path)
    parser.add_argument("--model", type=Path, default=TINY, help="diffusers-format directory")
    parser.add_argument("--size", type=int, help="pixels a side")
    args = parser.parse_args()
    profile = Profile(args.model, args.size or (128 if args.model == TINY else 1024))
    about: dict[str, Any] = {"model": args.model.name, "size": profile.size, "torch": torch.__version__}
    with torch.inference_mode():
        machine.report(about | {"forwards": profile.forwards(), "kernels": profile.kernels()}, args.output)


class Profile:
    """The model, and the two measurements."""

    def __init__(self, folder: Path, size: int) -> None:
        self._folder, self.size = folder, size
        self._cuda = torch.cuda.is_available()
        device, dtype = ("cuda", torch.bfloat16) if self._cuda else ("cpu", torch.float32)
        self._options = Options(device=device, dtype=dtype)
        self._model = load_model(folder, self._options)
        self._config = self._model.description.transformer
        self._embeds = self._model.encode(["a red apple on a table"], 512)
        side = size // 8
        self._noise = torch.randn(1, 16, side, side, generator=torch.Generator().manual_seed(2))
        self._tokens = padded_length((size // 16) ** 2) + CAPTION

    def forwards(self) -> dict[str, Any]:
        """Eight forwards of each variant, in turn, and a decode: milliseconds, and how far the latents are from bf16's.

        The difference is a share of what the forwards move the noise by.
        """
        changes: dict[str, dict[str, Any]] = {"plain torch": {"fused_kernels": False}}
        if self._cuda:
            changes |= {"fp8": {"precision": "fp8"}, "fp8 cudnn": {"precision": "fp8", "attention": "cudnn"}}
            if sdpa.try_attention("flash3_fp8", self._options.dtype, self._config.head_dim)[0] is not None:
                changes["fp8 + flash3_fp8"] = {"precision": "fp8", "attention": "flash3_fp8"}
        models = {"as it is": self._model} | {name: self._variant(**more) for name, more in changes.items()}
        latents = {name: self._denoise(model) for name, model in models.items()}
        times: dict[str, list[float]] = {name: [] for name in models}
        for _ in range(4):  # what comes later runs on a warmer, slower machine
            for name, model in models.items():
                times[name].append(round(self._sustained(lambda m=model: self._denoise(m), 2.0), 1))
        tera, plain = STEPS * self._flops() / 1e9, latents["as it is"]
        moved = (plain - self._noise.to(plain.device)).norm()
        report: dict[str, Any] = {"attention": self._model.attention.name}
        for name, each in times.items():
            difference = ((latents[name] - plain).norm() / moved).item()
            report[name] = {"ms": each, "TFLOP/s": round(tera / min(each[1:])), "difference": round(difference, 4)}
        return report | {"decode ms": round(self._sustained(lambda: self._model.vae(plain)), 2)}

    def kernels(self) -> dict[str, Any]:
        """torch.profiler's milliseconds on the device by kernel: eight forwards, a decode, a caption."""
        from torch.profiler import ProfilerActivity, profile

        latents = self._denoise(self._model)
        calls: dict[str, Callable[[], Any]] = {
            "eight forwards": lambda: self._denoise(self._model),
            "decode": lambda: self._model.decode(latents).wait(),
            "encode": lambda: self._model.encode(["a red apple on a table"], 512),
        }
        if self._cuda:
            eight = self._variant(precision="fp8")
            calls["eight forwards in fp8"] = lambda: self._denoise(eight)
        report = {}
        for name, call in calls.items():
            call()
            with profile(activities=[ProfilerActivity.CUDA if self._cuda else ProfilerActivity.CPU]) as recorded:
                call()
                self._finish()
            rows = [
                ((event.self_device_time_total or event.self_cpu_time_total) / 1e3, event.count, event.key[:90])
                for event in recorded.key_averages()
            ]
            report[name] = ["{:9.2f} ms {:6} x {}".format(*row) for row in sorted(rows, reverse=True)[:LARGEST]]
        return report

    def _variant(self, **changes: Any) -> NativeModel:
        """The model's transformer with other options."""
        model = open_model(self._folder, dataclasses.replace(self._options, **changes))
        load_transformer(model, self._folder)
        return model

    def _denoise(self, model: NativeModel) -> torch.Tensor:
        return model.denoise(self._embeds, self._noise, STEPS)

    def _flops(self) -> float:
        """Floating point operations of one forward: products and attention of the image's and the unified blocks."""
        config, unified, image = self._config, self._tokens, self._tokens - CAPTION
        per_token = 2 * (4 * config.dim**2 + 3 * config.dim * config.hidden_dim)
        linear = per_token * (config.n_layers * unified + config.n_refiner_layers * image)
        return linear + 4 * config.dim * (config.n_layers * unified**2 + config.n_refiner_layers * image**2)

    def _finish(self) -> None:
        if self._cuda:
            torch.cuda.synchronize()

    def _sustained(self, call: Callable[[], Any], seconds: float = 0.7) -> float:
        """Mean milliseconds of a call repeated for about so long: at the power limit, as in a long run."""
        call()
        self._finish()
        began, count = time.perf_counter(), 0
        while (took := time.perf_counter() - began) < seconds:
            for _ in range(20 if count else 1):
                call()
                count += 1
            self._finish()
        return 1e3 * took / count


if __name__ == "__main__":
    main()
