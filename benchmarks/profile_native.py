"""Where the native engine's milliseconds go, on random weights of the published sizes.

    python benchmarks/profile_native.py results.json           # one GPU, about a minute
    python benchmarks/profile_native.py results.json --tiny    # the embedded model's sizes; also on the CPU

Single kernels and attention: profile_precision.py. Predictions made beforehand and what came of them: profile_notes.md.
"""

from __future__ import annotations

import argparse
import gc
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, cast

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from benchmarks.profile_models import Clock, build, diffusers_models, measure, noise, variant
from zimage_runner.engines.native import sdpa as attention_module
from zimage_runner.engines.native.model import NativeModel, Options
from zimage_runner.engines.native.rope import padded_length
from zimage_runner.engines.native.vae_decoder import UpBlock, wide_attention

STEPS = 8


class Profile:
    """The measurements; every public method is a section."""

    def __init__(self, tiny: bool, device: str) -> None:
        self.tiny, self.device = tiny, device
        self.dtype = torch.bfloat16 if device == "cuda" else torch.float32
        self.size = 128 if tiny else 1024
        self.clock = Clock(device, 2 if device == "cpu" else 5)
        self.about: dict[str, Any] = {"tiny": tiny, "torch": torch.__version__}
        self.options = Options(device=device, dtype=self.dtype)
        if device == "cuda":
            self.about["gpu"] = torch.cuda.get_device_name()
        self.model: NativeModel = build(tiny, self.options)
        generator = torch.Generator().manual_seed(1)
        width = self.model.transformer.config.cap_feat_dim
        self.embeds = [torch.randn(24, width, generator=generator).to(device, self.dtype)]

    def randn(self, *shape: int, scale: float = 1.0) -> torch.Tensor:
        return (torch.randn(*shape, device=self.device) * scale).to(self.dtype)

    def tokens(self, batch: int, size: int) -> int:
        return batch * (padded_length((size // 16) ** 2) + 32)

    def flops(self, batch: int, size: int) -> float:
        """Floating point operations of one forward: products and attention of the image and unified blocks."""
        config = self.model.transformer.config
        unified, image = self.tokens(1, size), self.tokens(1, size) - 32
        per_token = 2 * (4 * config.dim**2 + 3 * config.dim * config.hidden_dim)
        linear = per_token * (config.n_layers * unified + config.n_refiner_layers * image)
        attend = 4 * config.dim * (config.n_layers * unified**2 + config.n_refiner_layers * image**2)
        return batch * (linear + attend)

    # sections, in order

    def matmul(self) -> dict[str, float]:
        """TFLOP/s of the model's products and of a large square one."""
        config, tokens = self.model.transformer.config, self.tokens(1, self.size)
        square = 256 if self.tiny else 8192
        shapes = {
            "square": (square, square, square),
            "qkv": (tokens, config.dim, 3 * config.dim),
            "out": (tokens, config.dim, config.dim),
            "w1w3": (tokens, config.dim, 2 * config.hidden_dim),
            "w2": (tokens, config.hidden_dim, config.dim),
            "w1w3 without caption": (tokens - 32, config.dim, 2 * config.hidden_dim),
        }
        rates = {}
        for library in ("cublas", "cublaslt") if self.device == "cuda" else ("",):
            if library:
                torch.backends.cuda.preferred_blas_library(library)
            for name, (m, k, n) in shapes.items():
                # Several weights in turn, so that none is in the cache.
                x, weights = self.randn(m, k), [self.randn(n, k) for _ in range(4)]
                ms = self.clock(lambda x=x, weights=weights: [torch.nn.functional.linear(x, w) for w in weights])
                rates[f"{name} {library}"] = 2 * m * k * n * 4 / ms / 1e9
        if self.device == "cuda":
            torch.backends.cuda.preferred_blas_library("default")
        return rates

    def roofline(self) -> dict[str, Any]:
        """Eight forwards and a large product in turn, so that both are measured at the same temperature and power."""
        z, square = noise(1, self.size), 256 if self.tiny else 8192
        x, weights = self.randn(square, square), [self.randn(square, square) for _ in range(4)]
        count = 1 if self.tiny else 120

        def products() -> None:
            for number in range(count):
                torch.nn.functional.linear(x, weights[number % 4])

        ours, theirs = [], []
        for _ in range(2 if self.tiny else 4):
            ours.append(self.clock(lambda: self.model.denoise(self.embeds, z, STEPS), 1, warm=0))
            theirs.append(self.clock(products, 1, warm=0))
        denoise = STEPS * self.flops(1, self.size) / min(ours[1:]) / 1e9
        product = 2 * square**3 * count / min(theirs[1:]) / 1e9
        return {"denoise ms": ours, "denoise TFLOP/s": denoise, "product TFLOP/s": product, "share": denoise / product}

    def error(self) -> dict[str, Any]:
        """Rounding error of one forward and of all steps against float32 on the same weights; diffusers' beside it."""
        model, size = self.model, self.size if self.tiny else 512
        reference = variant(model, dtype=torch.float32, fused_kernels=False, attention="native")
        report: dict[str, Any] = {}
        for steps in (1, STEPS):
            z = noise(1, size)
            expected = reference.denoise(self.embeds, z, steps)
            got = {"native": model.denoise(self.embeds, z, steps)}
            if self.peer is not None:
                got["diffusers"] = self.peer_denoise(z, steps)
            moved = (expected - z.to(self.device)).square().mean().sqrt()
            report[f"{steps} forwards"] = {
                name: ((x - expected).square().mean().sqrt() / moved).item() for name, x in got.items()
            }
        return report

    @property
    def peer(self) -> Any:
        """diffusers' transformer and VAE on the same weights; None where diffusers is not installed."""
        if not hasattr(self, "_peer"):
            try:
                self._peer = diffusers_models(self.model, self.tiny)
            except ImportError as error:
                self.about["diffusers"] = str(error)
                self._peer = None
        return self._peer

    def peer_denoise(self, z: torch.Tensor, steps: int, backend: str = "native") -> torch.Tensor:
        """diffusers' transformer in the pipeline's loop."""
        transformer = self.peer[0]
        transformer.set_attention_backend(backend)
        schedule, _ = self.model._steps(steps)
        latents = z.to(self.device)
        for time_, delta in zip(schedule.times, schedule.deltas()):
            x = list(latents.to(self.dtype).unsqueeze(2).unbind(0))
            t = time_.expand(len(x)).to(self.device)
            out = transformer(x, t, self.embeds * len(x), return_dict=False)[0]
            latents = latents - delta * torch.stack(out).float().squeeze(2)
        return latents

    def decode(self) -> dict[str, float]:
        """ms of one decode: whole, parts, and diffusers'."""
        latents = self.model.denoise(self.embeds, noise(1, self.size), 1)
        vae = self.model.vae
        side, channels = self.size // 8, vae.config.block_out_channels[-1]
        x = self.randn(1, channels, side, side).contiguous(memory_format=torch.channels_last)
        tokens = self.randn(1, side * side, channels)
        sdpa = torch.nn.functional.scaled_dot_product_attention
        report = {
            "decode": self.clock(lambda: vae(latents)),
            "to the host": self.clock(lambda: self.model.decode(latents).wait()),
            "middle without attention": self.clock(lambda: vae.mid_resnets[1](vae.mid_resnets[0](x))),
            "attention": self.clock(lambda: wide_attention(tokens, tokens, tokens)),
            "attention by sdpa": self.clock(lambda: sdpa(tokens[:, None], tokens[:, None], tokens[:, None])),
        }
        for number, block in enumerate(vae.up_blocks):
            for layer in cast("UpBlock", block).layers():
                report[f"up block {number} {type(layer).__name__}"] = self.clock(lambda f=layer, x=x: f(x))
                x = layer(x)
        torch.backends.cudnn.benchmark = True
        report["decode, cuDNN tuned"] = self.clock(lambda: vae(latents))
        torch.backends.cudnn.benchmark = False
        if self.peer is not None:
            scaled = latents.to(self.dtype)
            report["diffusers"] = self.clock(lambda: self.peer[1].decode(scaled))
        return report

    def forwards(self) -> dict[str, Any]:
        """ms of eight forwards at the full size: eager, recorded, and diffusers'."""
        z = noise(1, self.size)
        tera = STEPS * self.flops(1, self.size) / 1e12
        report: dict[str, Any] = {"TFLOP": tera}
        variants = {"as it is": self.model}
        if self.device == "cuda":
            for name in ("cudnn", "flash3"):
                if attention_module.try_attention(name, self.dtype, self.model.description.transformer.head_dim)[0]:
                    variants[name] = variant(self.model, attention=name)
            variants["graph"] = variant(self.model, cuda_graphs=4)
            variants["plain torch"] = variant(self.model, fused_kernels=False)
        times: dict[str, list[float]] = {name: [] for name in variants}
        for _ in range(4):  # in turn: what comes later runs on a warmer, slower machine
            for name, model in variants.items():
                times[name].append(self.clock(lambda m=model: m.denoise(self.embeds, z, STEPS), 1, warm=0))
        for name, model in variants.items():
            ms = sorted(times[name][1:])[1]
            report[name] = {"ms": ms, "TFLOP/s": tera / ms * 1e3}
            model.graphs.clear()
        if self.peer is not None:
            for backend in ("native", "_native_cudnn") if self.device == "cuda" else ("native",):
                ms = self.clock(lambda b=backend: self.peer_denoise(z, STEPS, b), 2, warm=1)
                report[f"diffusers {backend}"] = {"ms": ms, "TFLOP/s": tera / ms * 1e3}
        return report

    def batches(self) -> dict[str, Any]:
        """ms per picture at half the side: eight forwards and a decode at several batch sizes; diffusers one by one."""
        size, report = self.size // 2, {}
        graphs = variant(self.model, cuda_graphs=8)
        for batch in (1, 4, 8):
            z = noise(batch, size)
            for name, model in {"eager": self.model, "graph": graphs}.items():
                if name == "graph" and (batch > 1 or self.device == "cpu"):
                    continue
                ms = self.clock(lambda m=model, z=z, n=batch: m.denoise(self.embeds * n, z, STEPS), 3) / batch
                rate = STEPS * self.flops(1, size) / ms / 1e9
                report[f"{name} {batch}"] = {"ms a picture": ms, "TFLOP/s": rate}
        graphs.graphs.clear()
        latents = self.model.denoise(self.embeds, noise(1, size), 1)
        report["decode"] = self.clock(lambda: self.model.vae(latents))
        if self.peer is not None:
            ms = self.clock(lambda: self.peer_denoise(noise(1, size), STEPS), 2, warm=1)
            scaled = latents.to(self.dtype)
            report["diffusers 1"] = {"ms a picture": ms, "decode": self.clock(lambda: self.peer[1].decode(scaled))}
        return report

    def sweep(self) -> dict[str, Any]:
        """Seconds a picture of a sweep with new prompts: encode, denoise, decode and PNG, overlapping; peak memory."""
        import io

        from PIL import Image

        def save(pending: Any) -> int:
            file = io.BytesIO()
            Image.fromarray(pending.wait()[0]).save(file, "PNG", compress_level=1)
            return file.tell()

        def draw(number: int) -> Any:
            embeds = self.model.encode([f"picture number {number} of a red apple on a table"], 512)
            return self.model.decode(self.model.denoise(embeds, noise(1, self.size), STEPS))

        self.__dict__.pop("_peer", None)  # its memory; built again by who asks next
        gc.collect()
        report: dict[str, Any] = {}
        if self.device == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            report["weights GB"] = torch.cuda.memory_allocated() / 1e9
        with ThreadPoolExecutor(2) as pool:
            save(draw(0))
            count, began = 2 if self.device == "cpu" else 8, time.perf_counter()
            saved = [pool.submit(save, draw(number)) for number in range(1, count + 1)]
            report["host ahead s"] = time.perf_counter() - began
            report["PNG bytes"] = sum(future.result() for future in saved) // count
            report["s a picture"] = (time.perf_counter() - began) / count
        if self.device == "cuda":
            report["peak GB"] = torch.cuda.max_memory_allocated() / 1e9
            report["reserved GB"] = torch.cuda.max_memory_reserved() / 1e9
        report["encode ms"] = self.clock(lambda: self.model.encode(["a red apple on a table"], 512))
        return report

    def tables(self) -> dict[str, list]:
        """torch.profiler's ms on the device by kernel, of eight forwards and of a decode."""
        from torch.profiler import ProfilerActivity, profile

        latents = noise(1, self.size).to(self.device)
        calls = {
            "eight forwards": lambda: self.model.denoise(self.embeds, noise(1, self.size), STEPS),
            "decode": lambda: self.model.decode(latents).wait(),
            "encode": lambda: self.model.encode(["a red apple on a table"], 512),
        }
        if self.device == "cuda":
            eight = variant(self.model, precision="fp8")
            calls["eight forwards in fp8"] = lambda: eight.denoise(self.embeds, noise(1, self.size), STEPS)
        report = {}
        kinds = [ProfilerActivity.CUDA] if self.device == "cuda" else [ProfilerActivity.CPU]
        for name, call in calls.items():
            call()
            with profile(activities=kinds) as recorded:
                call()
                if self.device == "cuda":
                    torch.cuda.synchronize()
            rows = [
                (event.key[:90], event.count, (event.self_device_time_total or event.self_cpu_time_total) / 1e3)
                for event in recorded.key_averages()
            ]
            rows.sort(key=lambda row: -row[2])
            report[name] = rows[:16]
        return report


SECTIONS = ("sweep", "matmul", "roofline", "forwards", "decode", "error", "batches", "tables")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path)
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--sections", nargs="*", default=SECTIONS)
    arguments = parser.parse_args()
    profile = Profile(arguments.tiny, "cuda" if torch.cuda.is_available() else "cpu")
    measure(profile, arguments.sections, profile.about, arguments.output)


if __name__ == "__main__":
    main()
