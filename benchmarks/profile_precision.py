"""Where the milliseconds of eight-bit arithmetic go, on random weights of the published sizes.

    python benchmarks/profile_precision.py results.json [section ...]      # one GPU, about two minutes

Predictions and what came of them: profile_notes.md.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from benchmarks.profile_models import Clock, build, measure, noise, variant
from zimage_runner.engines.native.kernels import choose_operations, fused_ops, torch_ops
from zimage_runner.engines.native.model import NativeModel, Options
from zimage_runner.engines.native.quantised import FP8, INT8, QuantisedLinear, Scaled, quantised

STEPS, SIZE, TOKENS = 8, 1024, 4128
SHAPES = {"qkv": (3840, 11520), "out": (3840, 3840), "w1w3": (3840, 20480), "w2": (10240, 3840)}


def sustained(call: Callable[[], Any], seconds: float = 0.7) -> float:
    """Mean milliseconds of a call repeated for about so many seconds."""
    call()
    torch.cuda.synchronize()
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    began, count = time.perf_counter(), 0
    begin.record()
    while time.perf_counter() - began < seconds:
        for _ in range(20):
            call()
        count += 20
        torch.cuda.synchronize()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / count


def recorded(call: Callable[[], Any], repeats: int = 40) -> float:
    """Milliseconds of a call, one of many in a CUDA graph."""
    call()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(repeats):
            call()
    graph.replay()
    return Clock("cuda", 5)(graph.replay) / repeats


class Profile:
    """The measurements; every public method is a section."""

    def __init__(self) -> None:
        self.clock = Clock("cuda", 5)
        self.options = Options(device="cuda", dtype=torch.bfloat16)
        self.ops = choose_operations("cuda")

    def randn(self, *shape: int) -> torch.Tensor:
        return torch.randn(*shape, device="cuda").bfloat16()

    def kernels(self) -> dict[str, Any]:
        """Fused kernels, microseconds of each in a recorded row of forty: launches do not count."""
        dim, hidden = 3840, 10240
        x, update, w1w3 = self.randn(1, TOKENS, dim), self.randn(1, TOKENS, dim), self.randn(1, TOKENS, 2 * hidden)
        scale, gate = torch.rand(dim, device="cuda"), torch.rand(dim, device="cuda")
        scaled = Scaled(update, torch.rand(TOKENS, device="cuda"), scale, torch.bfloat16)
        ops, n = self.ops, x.nbytes
        cases: dict[str, tuple[Callable[[], Any], float]] = {
            "add_gated_norm bf16": (lambda: ops.add_gated_norm(x, update, gate, scale, 1e-5), 4 * n),
            "add_gated_norm fp8": (lambda: ops.add_gated_norm(x, scaled, gate, scale, 1e-5, FP8), 3.5 * n),
            "swiglu bf16": (lambda: ops.swiglu(w1w3), 1.5 * w1w3.nbytes),
            "swiglu fp8": (lambda: ops.swiglu(w1w3, FP8), 1.25 * w1w3.nbytes),
            "quantise fp8": (lambda: ops.product_input(x, FP8), 1.5 * n),
            "rotate_quantise int8": (lambda: ops.product_input(x, INT8), 1.5 * n),
        }
        report: dict[str, Any] = {}
        for name, (call, moved) in cases.items():
            us = 1e3 * recorded(call)
            report[name] = {"us": round(us, 1), "GB/s": round(moved / us / 1e3)}
        return report

    def products(self) -> dict[str, Any]:
        """TFLOP/s of each product, sustained: bf16, fp8 with scales by rows, fp8 folded, int8."""
        report: dict[str, Any] = {}
        for name, (inputs, outputs) in SHAPES.items():
            weights = [self.randn(outputs, inputs) / inputs**0.5 for _ in range(3)]
            x = self.randn(TOKENS, inputs)
            tera = 2 * TOKENS * inputs * outputs * 3 / 1e9
            row = {"bf16": tera / sustained(lambda x=x, w=weights: [torch.nn.functional.linear(x, y) for y in w])}
            for form, folded in ((FP8, False), (FP8, True), (INT8, True)):
                layers = [QuantisedLinear(inputs, outputs, form, torch.bfloat16, folded) for _ in weights]
                for layer, weight in zip(layers, weights):
                    layer.take(weight)
                q = quantised(x, form)
                label = f"{form.name}{' folded' if folded else ''}"
                row[label] = tera / sustained(lambda q=q, layers=layers: [layer(q) for layer in layers])
            report[name] = {label: round(value) for label, value in row.items()}
        return report

    def attention(self) -> dict[str, Any]:
        """FlashAttention 3 in bf16 and fp8, cuDNN, and the kernels that make their inputs; sustained."""
        from zimage_runner.engines.native import flash3
        from zimage_runner.engines.native import sdpa as attention_module

        heads, head_dim = 30, 128
        qkv = self.randn(1, TOKENS, 3 * heads * head_dim)
        weight = torch.rand(2, head_dim, device="cuda") + 0.5
        angles = torch.rand(TOKENS, head_dim // 2, device="cuda") * 50
        cos, sin = angles.cos(), angles.sin()
        scales = torch.full((3, heads), head_dim**0.5 * 1.5 / 448, device="cuda")
        tera = 4 * TOKENS**2 * heads * head_dim / 1e9
        report: dict[str, Any] = {
            "qk_norm_rope": recorded(lambda: self.ops.qk_norm_rope(qkv.clone(), weight, cos, sin, 1e-5)),
            "its copy": recorded(lambda: qkv.clone()),
            "qk_norm_rope_quantised": recorded(
                lambda: fused_ops.qk_norm_rope_quantised(qkv, weight, cos, sin, 1e-5, scales)
            ),
        }
        query, key, value = torch_ops.qk_norm_rope(qkv, weight, cos, sin, 1e-5)
        exact = attention_module.plain_attention(query[:, :, :4], key[:, :, :4], value[:, :, :4])
        for name in ("flash3", "cudnn"):
            backend, reason = attention_module.try_attention(name, torch.bfloat16, head_dim)
            if backend is None:
                report[name] = reason
                continue
            with backend.context():
                ms = sustained(lambda b=backend: b.attend(query, key, value))
                got = backend.attend(query, key, value)[:, :, :4].float()
            report[name] = {"ms": ms, "TFLOP/s": tera / ms, "error": ((got - exact).norm() / exact.norm()).item()}
        operator = flash3._operator("fa3_fwd")
        eight = fused_ops.qk_norm_rope_quantised(qkv, weight, cos, sin, 1e-5, scales)
        reference = torch_ops.qk_norm_rope_quantised(qkv, weight, cos, sin, 1e-5, scales)
        report["quantised kernel differs in"] = [
            (a.float() != b.float()).float().mean().item() for a, b in zip(eight, reference)
        ]
        descales = [scale[None] for scale in scales]

        def attend() -> torch.Tensor:
            return operator(
                *eight, q_descale=descales[0], k_descale=descales[1], v_descale=descales[2],
                softmax_scale=head_dim**-0.5, num_splits=1,
            )[0]  # fmt: skip

        got = attend()
        report["fp8 result"] = [str(got.dtype), list(got.shape), got.is_contiguous()]
        ms = sustained(attend)
        error = ((got[:, :, :4].float() - exact).norm() / exact.norm()).item()
        report["flash3 fp8"] = {"ms": ms, "TFLOP/s": tera / ms, "error": error}
        return report

    def forwards(self) -> dict[str, Any]:
        """Eight forwards of each variant in turn, sustained; differences of latents; peak memory."""
        model = build(False, self.options)
        generator = torch.Generator().manual_seed(1)
        embeds = [torch.randn(24, 2560, generator=generator).to("cuda", torch.bfloat16)]
        z = noise(1, SIZE)
        variants = {"bf16": model, "fp8": variant(model, precision="fp8")}
        variants["fp8 by rows"] = variant(model, precision="fp8")
        for module in variants["fp8 by rows"].transformer.modules():
            if isinstance(module, QuantisedLinear):
                module.folded = False
        variants["fp8 cudnn"] = variant(model, precision="fp8", attention="cudnn")
        variants["fp8 + flash3_fp8"] = variant(model, precision="fp8", attention="flash3_fp8")
        variants["bf16 cudnn"] = variant(model, attention="cudnn")
        variants["int8"] = variant(model, precision="int8")
        report: dict[str, Any] = {"attention": model.attention.name}
        latents = {name: m.denoise(embeds, z, STEPS) for name, m in variants.items()}
        times: dict[str, list[float]] = {name: [] for name in variants}
        for _ in range(4):
            for name, m in variants.items():
                if name == "int8" and len(times[name]) > 1:
                    continue
                times[name].append(sustained_denoise(m, embeds, z))
        for name in variants:
            moved = (latents["bf16"] - z.cuda()).norm()
            difference = ((latents[name] - latents["bf16"]).norm() / moved).item()
            report[name] = {"ms": [round(t, 1) for t in times[name]], "difference": round(difference, 4)}
        baseline = torch.cuda.memory_allocated()
        for name in ("bf16", "fp8"):
            torch.cuda.reset_peak_memory_stats()
            variants[name].denoise(embeds, z, 1)
            report[f"denoise peak {name} GB"] = round((torch.cuda.max_memory_allocated() - baseline) / 1e9, 3)
        torch.cuda.reset_peak_memory_stats()
        model.decode(latents["bf16"]).wait()
        report["decode peak GB"] = round((torch.cuda.max_memory_allocated() - baseline) / 1e9, 3)
        report["decode ms"] = sustained(lambda: model.vae(latents["bf16"]), 0.5)
        return report

    def streamed(self) -> dict[str, Any]:
        """Eight forwards with weights from host memory and with resident ones: ms a picture, bits, memory."""
        model = build(False, self.options)
        del model.text_encoder
        embeds = [torch.randn(24, 2560, device="cuda").bfloat16()]
        report: dict[str, Any] = {}
        for precision in ("fp8", "bf16"):
            resident = variant(model, precision=precision)
            latents = {batch: resident.denoise(embeds * batch, noise(batch, SIZE), STEPS) for batch in (1, 4)}
            report[f"{precision} resident, 4"] = (
                timed(lambda m=resident: m.denoise(embeds * 4, noise(4, SIZE), STEPS)) / 4
            )
            del resident
            torch.cuda.empty_cache()
            before = torch.cuda.memory_allocated()
            began = time.perf_counter()
            streamed = variant(model, precision=precision, streamed=True)
            stream = streamed.transformer.stream
            assert stream is not None
            report[f"{precision} to host memory, s; page-locking"] = [time.perf_counter() - began, stream._locking]
            for batch in (1, 2, 4):
                torch.cuda.reset_peak_memory_stats()
                got = streamed.denoise(embeds * batch, noise(batch, SIZE), STEPS)
                ms = timed(lambda m=streamed, b=batch: m.denoise(embeds * b, noise(b, SIZE), STEPS)) / batch
                ratio = stream.copying_over_computing()
                peak = (torch.cuda.max_memory_allocated() - before) / 1e9
                same = torch.equal(got, latents[batch]) if batch in latents else None
                report[f"{precision} streamed, {batch}: ms, same, copying/computing, GB"] = [ms, same, ratio, peak]
            stream.close()
            del streamed, stream
        return report


def timed(call: Callable[[], Any]) -> float:
    """Milliseconds of a call after another one."""
    call()
    return Clock("cuda", 2)(call, 2, warm=0)


def sustained_denoise(model: NativeModel, embeds: list[torch.Tensor], z: torch.Tensor) -> float:
    """Milliseconds of eight forwards, the mean of three in a row after one."""
    model.denoise(embeds, z, STEPS)
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    for _ in range(3):
        model.denoise(embeds, z, STEPS)
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 3


def main() -> None:
    sections = sys.argv[2:] or ["kernels", "products", "attention", "forwards"]
    measure(Profile(), sections, {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__}, Path(sys.argv[1]))


if __name__ == "__main__":
    main()
