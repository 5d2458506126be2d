"""Train text encoder and transformer by flow matching: `python -m training.train_transformer`, or `torchrun`.

May be started while the VAE still trains: it compiles on random data, then waits for the VAE and the caption pools.
Noise levels follow Z-Image-Turbo's static shift 3.0; the model predicts data minus noise, as Z-Image's does.
"""

from __future__ import annotations

# The types that diffusers and torch declare here are narrower than what they take.
# pyright: reportArgumentType=false
import random
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from training.batched import encode_text, rope_tables, sample, velocity
from training.cases import Case, load_cases
from training.config import TrainingConfig, command
from training.export import save_checkpoint
from training.latents import TrainingPool, make_encoder
from training.models import (
    LATENT_CHANNELS,
    SHIFT,
    build_text_encoder,
    build_transformer,
    count,
    load_tokenizer,
    load_vae,
)
from training.names import load_pictures
from training.optim import Average, Optimizers
from training.parallel import Budget, Team, schedule
from training.pools import bucket_of
from training.render import Poser, Renderer, contact_sheet, load_rgba
from training.retrieval import thumbnails
from training.scoring import Judge
from training.tokenizer import chat

LATENT_SIDE = 16  # 128 pixels
WARMUP = 200
SHEET = [
    "a red apple", "a cute cat face", "一只猫", "a dog", "a rocket", "红苹果", "a cup of coffee", "熊猫", "a blue car",
    "sunflower", "a green cat", "two red apples", "a cat and a dog", "a cat and an apple", "苹果和香蕉", "", "robot",
    "a purple elephant", "could you paint a lion for me", "a banana on a blue background", "a fruit", "an animal",
    "birthday cake", "火",
]  # fmt: skip

LAST_PROBE = (
    "en_unread", "en_unread_alias", "zh_unread", "zh_unread_alias", "en_label", "en_alias", "zh_label", "zh_alias",
    "colored", "pairs",
)  # fmt: skip


def noise_levels(count: int, device: torch.device) -> Tensor:
    """Sigmas [count], stratified over (0, 1) and bent by the sampler's shift, in random order.

    The order matters: a batch lists single pictures before scenes, and sorted levels would never show the model a
    single picture at a high level, where the layout is decided.
    """
    u = (torch.randperm(count, device=device) + torch.rand(count, device=device)) / count
    return SHIFT * u / (1 + (SHIFT - 1) * u)


class FlowModel:
    """Text encoder and transformer with their loss."""

    def __init__(self, cfg: TrainingConfig, device: torch.device) -> None:
        vocab = len(load_tokenizer(cfg.data.work))
        self.encoder: Any = build_text_encoder(cfg.text, vocab).to(device).float()  # type: ignore[arg-type]
        self.transformer: Any = build_transformer(cfg.transformer, cfg.text).to(device).float()
        self.device = device
        half = LATENT_SIDE // 2
        self.ropes = {b: rope_tables(self.transformer, b, half, half, device) for b in cfg.transformer.buckets}
        fast = torch.compile(self._loss, dynamic=False) if device.type == "cuda" else self._loss
        self.losses = {b: fast if b in cfg.transformer.compiled else self._loss for b in cfg.transformer.buckets}

    def load(self, checkpoint: Path) -> None:
        """Start from the weights of an exported checkpoint."""
        parts = {"transformer": self.transformer, "text_encoder": self.encoder}
        for name, module in parts.items():
            (file,) = (checkpoint / name).glob("*.safetensors")
            missing, unexpected = module.load_state_dict(load_file(file), strict=False)
            assert not missing, (missing, unexpected)

    def _loss(self, z: Tensor, noise: Tensor, sigma: Tensor, ids: Tensor, image: Tensor, text: Tensor) -> Tensor:
        level = sigma[:, None, None, None]
        noisy = (1 - level) * z + level * noise
        out = velocity(self.transformer, noisy, 1 - sigma, encode_text(self.encoder, ids), ids != 0, (image, text))
        return (out.float() - (z - noise)).square().mean((1, 2, 3))

    def loss(self, z: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
        """(squared error, sigma), each [B], at stratified noise levels with the sampler's shift."""
        sigma, bucket = noise_levels(len(z), self.device), ids.shape[1]
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda"):
            return self.losses[bucket](z, torch.randn_like(z), sigma, ids, *self.ropes[bucket]), sigma


class Painter:
    """Draws pictures with the current weights, for the figures printed during training."""

    def __init__(self, flow: FlowModel, vae: Any, tokenizer: Any) -> None:
        self.flow, self.vae, self.tokenizer = flow, vae, tokenizer

    @torch.no_grad()
    def __call__(self, prompts: list[str], steps: int = 8, seed: int = 0) -> Tensor:
        """[B, 3, 128, 128] in [-1, 1], each at its own padded caption length; item k has seed `seed + k`."""
        encoded = self.tokenizer([chat(p) for p in prompts])["input_ids"]
        out: list[Tensor | None] = [None] * len(prompts)
        for bucket in sorted({bucket_of(len(e)) for e in encoded}):
            rows = [i for i, e in enumerate(encoded) if bucket_of(len(e)) == bucket]
            for part in (rows[k : k + 64] for k in range(0, len(rows), 64)):
                ids = torch.zeros(len(part), bucket, dtype=torch.long)
                for row, i in enumerate(part):
                    ids[row, : len(encoded[i])] = torch.tensor(encoded[i])
                shape = (LATENT_CHANNELS, LATENT_SIDE, LATENT_SIDE)
                noise = torch.stack(
                    [torch.randn(shape, generator=torch.Generator().manual_seed(seed + i)) for i in part]
                )
                device = self.flow.device
                z = sample(self.flow.transformer, self.flow.encoder, ids.to(device), noise.to(device), steps)
                images = self.vae.decode(z / self.vae.config.scaling_factor + self.vae.config.shift_factor).sample
                for i, image in zip(part, images.clamp(-1, 1)):
                    out[i] = image
        return torch.stack([x for x in out if x is not None])


def warm_up(cfg: TrainingConfig, flow: FlowModel, optimizers: Optimizers, team: Team) -> None:
    """Compile every bucket's step on random data, at a learning rate of zero and with nothing kept."""
    start, t = time.time(), cfg.transformer
    for bucket in t.compiled:
        for _ in range(2):
            z = torch.randn(t.batch, LATENT_CHANNELS, LATENT_SIDE, LATENT_SIDE, device=team.device)
            ids = torch.randint(3, flow.encoder.config.vocab_size, (t.batch, bucket), device=team.device)
            flow.loss(z, ids)[0].mean().backward()
            optimizers.step(0.0)
    optimizers.forget()
    team.say(f"transformer: compiled in {time.time() - start:.0f} s")


def wait_for(*files: Path) -> None:
    """Sleep until the files exist."""
    while not all(f.exists() for f in files):
        time.sleep(0.5)


def balanced(cases: list[Case], names: tuple[str, ...], each: int, rng: random.Random) -> dict[str, list[Case]]:
    """Up to `each` cases of every set."""
    by_set = {name: [c for c in cases if c.set == name] for name in names}
    return {name: rng.sample(found, min(each, len(found))) for name, found in by_set.items() if found}


class Trainer:
    """Everything one process holds while it trains."""

    def __init__(self, cfg: TrainingConfig, team: Team) -> None:
        self.cfg, self.team, self.work = cfg, team, Path(cfg.data.work)
        torch.manual_seed(cfg.seed)  # the same initial weights everywhere
        self.flow = FlowModel(cfg, team.device)
        t = cfg.transformer
        if t.resume:
            self.flow.load(Path(t.resume))
        self.optimizers = Optimizers([self.flow.transformer, self.flow.encoder], t.muon_lr, t.adam_lr)
        self.pictures = load_pictures(Path(cfg.data.packed), cfg.data.limit)
        rgba = load_rgba(Path(cfg.data.packed), cfg.data.limit)
        self.thumbs = thumbnails(rgba)
        self.render, self.poser = Renderer(rgba, team.device), Poser([p.flippable for p in self.pictures], team.device)
        team.say(
            f"transformer {count(self.flow.transformer) / 1e6:.2f} M,"
            f" text encoder {count(self.flow.encoder) / 1e6:.2f} M"
        )
        if team.device.type == "cuda":
            warm_up(cfg, self.flow, self.optimizers, team)
        self.average = Average(self.optimizers.parameters, t.ema)

    def load(self, budget: Budget) -> None:
        """Wait for the VAE and the captions, then encode this process's pool."""
        wait_for(self.work / "vae.done", self.work / "pools" / "done")
        budget.restart()
        self.vae, self.tokenizer = load_vae(self.work, self.team.device), load_tokenizer(self.work)
        torch.manual_seed(self.cfg.seed * 1000 + 1 + self.team.rank)
        t = self.cfg.transformer
        self.pool = TrainingPool(self.work / "pools", self.render, self.poser, make_encoder(self.vae), self.team,
                                 len(self.pictures), t.poses, t.encode_seconds)  # fmt: skip
        self.weights = torch.tensor([p.weight for p in self.pictures], device=self.team.device)
        self.team.say(self.pool.report)

    def step(self, bucket: int, factor: float) -> tuple[Tensor, Tensor]:
        """One update; returns this process's (errors, sigmas)."""
        z, ids = self.pool.draw(self.cfg.transformer.batch, bucket, self.weights, self.cfg.transformer.single)
        errors, sigma = self.flow.loss(z, ids)
        errors.mean().backward()
        self.team.average(self.optimizers.gradients())
        self.optimizers.step(factor)
        self.average.update()
        return errors.detach(), sigma

    def fit(self, budget: Budget) -> None:
        """Train until the time is up."""
        t, buckets = self.cfg.transformer, random.Random(self.cfg.seed)  # every process draws the same buckets
        step, last_save, started = 0, 0.0, self.team.agree(budget.elapsed)
        while (progress := budget.step()) < 1:
            bucket = buckets.choices(list(t.buckets), list(t.buckets.values()))[0]
            trained = max(0.0, (progress - started / t.seconds) / (1 - started / t.seconds))
            errors, sigma = self.step(bucket, t.factor * schedule(trained, step, WARMUP, t.hold))
            step += 1
            if step % 500 == 0 or (step % 5 == 0 and self.team.device.type == "cpu"):
                thirds = [errors[(sigma >= a) & (sigma < a + 0.34)].mean().item() for a in (0.0, 0.33, 0.66)]
                text = " ".join(f"{x:.3f}" for x in thirds)
                self.team.say(f"step {step} {budget.elapsed:.0f} s loss {errors.mean().item():.4f} by sigma {text}")
            if self.team.leads and budget.elapsed - last_save > t.save_every and progress < 0.93:
                last_save = budget.elapsed
                self.checkpoint(("en_label", "zh_label", "colored"), t.probe, budget)
        self.team.say(f"transformer: {step} steps in {budget.elapsed - started:.0f} s")

    def checkpoint(self, sets: tuple[str, ...], each: int, budget: Budget) -> None:
        """Save the averaged weights in bf16 and print retrieval on some held-out cases."""
        self.average.swap()
        flow = self.flow
        save_checkpoint(self.work / "nano", flow.transformer, flow.encoder, self.vae, self.tokenizer, torch.bfloat16)
        self.team.say(f"saved at {budget.elapsed:.0f} s")
        reference = Path(self.cfg.data.reference)
        painter = Painter(flow, self.vae, self.tokenizer)
        contact_sheet(painter(SHEET)).save(self.work / "sheet.jpg", quality=88)
        if len(self.pictures) > 1000 and each:
            if not hasattr(self, "judge"):
                self.judge = Judge(self.thumbs, [p.flippable for p in self.pictures], self.team.device)
            for name, cases in balanced(load_cases(reference), sets, each, random.Random(0)).items():
                score = self.judge.score(cases, painter([c.prompt for c in cases]))
                parts = " ".join(f"{k} {v:.2f}" for k, v in score.parts.items())
                self.team.say(f"  {name} top1 {score.top1:.3f} top5 {score.top5:.3f} of {score.cases} {parts}")
        self.average.swap()


def main(cfg: TrainingConfig) -> None:
    """Train, save, measure."""
    team = Team()
    torch.set_float32_matmul_precision("high")
    torch.backends.cudnn.benchmark = True
    trainer, budget = Trainer(cfg, team), Budget(team, cfg.transformer.seconds)
    trainer.load(budget)
    trainer.fit(budget)
    if team.leads:
        trainer.checkpoint(LAST_PROBE, 300, budget)
        (trainer.work / "nano.done").touch()
    team.close()


if __name__ == "__main__":
    command(main)
