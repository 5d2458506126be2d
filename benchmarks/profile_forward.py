"""Where the native engine's milliseconds go, in bf16 and in fp8.

    python -m benchmarks.profile_forward out.json --model /data/turbo [section ...]   # one GPU, about two minutes
    python -m benchmarks.profile_forward out.json       # the embedded model: tries it, also on a CPU, without fp8

Random weights of the published sizes: synthetic_checkpoint.py. Predictions and what came of them: profile_notes.md.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.scenarios import TINY
from zimage_runner.engines.native import sdpa
from zimage_runner.engines.native.assembly import load_model, load_transformer, open_model
from zimage_runner.engines.native.kernels import choose_operations, torch_ops
from zimage_runner.engines.native.model import NativeModel, Options
from zimage_runner.engines.native.quantised import FP8, QuantisedLinear, Scaled, quantised
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
    parser.add_argument("sections", nargs="*", default=["products", "kernels", "attention", "forwards", "tables"])
    args = parser.parse_args()
    profile = Profile(args.model, args.size or (128 if args.model == TINY else 1024))
    about: dict[str, Any] = {"model": args.model.name, "size": profile.size, "torch": torch.__version__}
    for name in args.sections:
        try:
            with torch.inference_mode():
                about[name] = getattr(profile, name)()
        except Exception:  # one that this machine cannot do leaves the others their figures
            about[name] = {"failed": traceback.format_exc().splitlines()[-12:]}
        print(f"\n{name}")
        for key, value in about[name].items():
            print(f"  {key}: {value}", flush=True)
        args.output.write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")


class Profile:
    """The measurements; every public method is a section."""

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

    def products(self) -> dict[str, Any]:
        """TFLOP/s of each product of a block; in fp8 with scales by rows, and with scales left to the next kernel."""
        dim, hidden = self._config.dim, self._config.hidden_dim
        shapes = {"qkv": (dim, 3 * dim), "out": (dim, dim), "w1w3": (dim, 2 * hidden), "w2": (hidden, dim)}
        report: dict[str, Any] = {}
        for name, (inputs, outputs) in shapes.items():
            # Several weights in turn, so that none is in the cache.
            weights = [self._randn(outputs, inputs) / inputs**0.5 for _ in range(3)]
            x = self._randn(self._tokens, inputs)
            calls: dict[str, Callable[[], Any]] = {
                "plain": lambda x=x, ws=weights: [torch.nn.functional.linear(x, w) for w in ws]
            }
            for label, folded in (("fp8 by rows", False), ("fp8 folded", True)) if self._cuda else ():
                layers = [QuantisedLinear(inputs, outputs, FP8, torch.bfloat16, folded) for _ in weights]
                for layer, weight in zip(layers, weights):
                    layer.take(weight)
                q = quantised(x, FP8)
                calls[label] = lambda q=q, layers=layers: [layer(q) for layer in layers]
            tera = 2 * self._tokens * inputs * outputs * len(weights) / 1e9
            report[name] = {label: round(tera / self._sustained(call), 1) for label, call in calls.items()}
        return report

    def kernels(self) -> dict[str, Any]:
        """Fused kernels: microseconds, launch included, and GB/s of what each must read and write."""
        dim, hidden = self._config.dim, self._config.hidden_dim
        x, update = self._randn(1, self._tokens, dim), self._randn(1, self._tokens, dim)
        w1w3 = self._randn(1, self._tokens, 2 * hidden)
        scale, gate = (torch.rand(dim, device=self._options.device) for _ in range(2))
        ops, n = choose_operations(self._options.device), x.nbytes
        cases: dict[str, tuple[Callable[[], Any], float]] = {
            "add_gated_norm": (lambda: ops.add_gated_norm(x, update, gate, scale, 1e-5), 4 * n),
            "swiglu": (lambda: ops.swiglu(w1w3), 1.5 * w1w3.nbytes),
        }
        if self._cuda:
            scaled = Scaled(update, torch.rand(self._tokens, device="cuda"), scale, torch.bfloat16)
            cases |= {
                "add_gated_norm fp8": (lambda: ops.add_gated_norm(x, scaled, gate, scale, 1e-5, FP8), 3.5 * n),
                "swiglu fp8": (lambda: ops.swiglu(w1w3, FP8), 1.25 * w1w3.nbytes),
                "quantise fp8": (lambda: ops.product_input(x, FP8), 1.5 * n),
            }
        report: dict[str, Any] = {}
        for name, (call, moved) in cases.items():
            us = 1e3 * self._sustained(call)
            report[name] = {"us": round(us, 1), "GB/s": round(moved / us / 1e3)}
        return report

    def attention(self) -> dict[str, Any]:
        """Milliseconds and TFLOP/s of each of a GPU's backends, or why it has not got it."""
        heads, head_dim = self._config.n_heads, self._config.head_dim
        qkv = self._randn(1, self._tokens, 3 * heads * head_dim)
        weight = torch.rand(2, head_dim, device=qkv.device) + 0.5
        angles = torch.rand(self._tokens, head_dim // 2, device=qkv.device) * 50
        query, key, value = torch_ops.qk_norm_rope(qkv, weight, angles.cos(), angles.sin(), 1e-5)
        tera = 4 * self._tokens**2 * heads * head_dim / 1e9
        report: dict[str, Any] = {}
        for name in ("flash3", "cudnn", "native") if self._cuda else ():
            backend, reason = sdpa.try_attention(name, self._options.dtype, head_dim)
            if backend is None:
                report[name] = reason
                continue
            with backend.context():
                ms = self._sustained(lambda b=backend: b.attend(query, key, value))
            report[name] = {"ms": round(ms, 3), "TFLOP/s": round(tera / ms, 1)}
        return report

    def forwards(self) -> dict[str, Any]:
        """Eight forwards of each variant, in turn, and a decode: milliseconds, and how far the latents are from bf16's.

        The difference is a share of what the forwards move the noise by.
        """
        changes: dict[str, dict[str, Any]] = {"plain torch": {"fused_kernels": False}}
        if self._cuda:
            changes |= {"fp8": {"precision": "fp8"}, "fp8 cudnn": {"precision": "fp8", "attention": "cudnn"}}
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

    def tables(self) -> dict[str, Any]:
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
                [(event.self_device_time_total or event.self_cpu_time_total) / 1e3, event.count, event.key[:90]]
                for event in recorded.key_averages()
            ]
            report[name] = sorted(rows, reverse=True)[:LARGEST]
        return report

    def _randn(self, *shape: int) -> torch.Tensor:
        return torch.randn(*shape, device=self._options.device).to(self._options.dtype)

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
