"""Train the autoencoder: `python -m training.train_vae`, or under `torchrun` with one process a GPU.

L1, squared and gradient-difference terms at three scales; a slight KL keeps latents near unit size; noise on half of
the decoder's inputs makes it forgive the transformer's small errors. Pictures in `vae.held_out` are never shown.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from training.config import TrainingConfig, command
from training.models import LATENT_CHANNELS, build_vae, count
from training.names import load_pictures, spread
from training.optim import Average
from training.parallel import Budget, Team, schedule
from training.render import Poser, Renderer, contact_sheet, load_rgba

KL_WEIGHT = 2e-4


def horizontal(x: Tensor) -> Tensor:
    """Differences between neighbouring columns."""
    return x[..., 1:] - x[..., :-1]


def vertical(x: Tensor) -> Tensor:
    """Differences between neighbouring rows."""
    return x[..., 1:, :] - x[..., :-1, :]


def vae_loss(vae: nn.Module, x: Tensor, noise: Tensor, extra: Tensor) -> tuple[Tensor, Tensor]:
    """(loss, squared error) of pictures x; `noise` reparametrises, `extra` is further noise in units of the latents."""
    module: Any = vae
    mean, log_variance = module.encoder(x).float().chunk(2, 1)
    log_variance = log_variance.clamp(-20, 5)
    z = mean + noise * (0.5 * log_variance).exp() + extra * mean.detach().std()
    error = module.decoder(z.to(x.dtype)).float() - x.float()
    half, quarter = F.avg_pool2d(error, 2), F.avg_pool2d(error, 4)
    loss = error.abs().mean() + 2 * error.square().mean() + 0.5 * quarter.abs().mean()
    loss = loss + 0.7 * (horizontal(error).abs().mean() + vertical(error).abs().mean())
    loss = loss + 0.5 * (horizontal(half).abs().mean() + vertical(half).abs().mean())
    kl = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).mean()
    return loss + KL_WEIGHT * kl, error.square().mean()


class PictureSource:
    """Random scenes for the VAE: half as the transformer draws them, half at any size and place."""

    def __init__(self, render: Renderer, poser: Poser, allowed: Tensor) -> None:
        self.render, self.poser, self.allowed = render, poser, allowed

    @torch.no_grad()
    def __call__(self, batch: int) -> Tensor:
        """[batch, 3, 128, 128] in [-1, 1]."""
        device = self.allowed.device
        rand = lambda *shape: torch.rand(shape, device=device)  # noqa: E731
        things = self.allowed[torch.randint(len(self.allowed), (batch, 2), device=device)]
        things[:, 1] = torch.where(rand(batch) < 0.35, things[:, 1], -1)
        tints = torch.where(rand(batch, 2) < 0.25, torch.randint(11, (batch, 2), device=device), -1)
        backdrop = torch.where(rand(batch) < 0.2, torch.randint(11, (batch,), device=device), -1)
        wide = (rand(batch) < 0.5).view(-1, 1, 1)
        pose = torch.where(wide, self.poser.wide(things), self.poser.training(things))
        return self.render(things, tints, backdrop, pose).contiguous(memory_format=torch.channels_last)


def psnr(a: Tensor, b: Tensor) -> Tensor:
    """Decibels [B] between pictures in [-1, 1]."""
    return -10 * ((a - b).square().mean((1, 2, 3)) / 4).clamp(min=1e-10).log10()


@torch.no_grad()
def reconstruct(vae: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    """(latent means, reconstructions) of pictures."""
    parts = [(z := vae.encode(b).latent_dist.mode(), vae.decode(z).sample.clamp(-1, 1)) for b in x.split(64)]
    return torch.cat([z for z, _ in parts]), torch.cat([y for _, y in parts])


def finish(cfg: TrainingConfig, team: Team, vae: Any, render: Renderer, poser: Poser, held_out: Tensor) -> None:
    """Measure, set the latents' scale and shift, save."""
    with torch.no_grad():
        everything = torch.arange(len(render.gamma), device=team.device)[:, None]
        things = torch.cat([everything, everything * 0 - 1], 1)
        x = torch.cat([render(t, t * 0 - 1, t[:, 0] * 0 - 1, poser.canonical(t)) for t in things.split(256)])
        z, y = reconstruct(vae, x)
        db, seen = psnr(x, y), torch.ones(len(x), dtype=torch.bool, device=team.device)
        seen[held_out] = False
        vae.register_to_config(scaling_factor=1 / z.std().item(), shift_factor=z.mean().item())
        team.say(
            f"vae psnr: seen {db[seen].mean():.2f} dB (p5 {db[seen].quantile(0.05):.2f}),"
            f" held out {db[~seen].mean():.2f}"
        )
        team.say(f"latents: mean {z.mean():.3f} std {z.std():.3f}")
    folder = Path(cfg.data.work)
    vae.to(memory_format=torch.contiguous_format).save_pretrained(folder / "vae")
    (folder / "vae.done").touch()
    pairs = torch.stack([x[held_out], y[held_out]], 1).flatten(0, 1)
    contact_sheet(pairs, 16).save(folder / "vae_held_out.jpg", quality=90)


def main(cfg: TrainingConfig) -> None:
    """Train until the time is up."""
    team = Team()
    torch.manual_seed(cfg.seed)
    torch.set_float32_matmul_precision("high")
    torch.backends.cudnn.benchmark = True
    pictures = load_pictures(Path(cfg.data.packed), cfg.data.limit)
    render = Renderer(load_rgba(Path(cfg.data.packed), cfg.data.limit), team.device)
    poser = Poser([p.flippable for p in pictures], team.device)
    held_out = torch.tensor(spread(len(pictures), cfg.vae.held_out), device=team.device)
    allowed = torch.ones(len(pictures), dtype=torch.bool, device=team.device)
    allowed[held_out] = False
    source = PictureSource(render, poser, allowed.nonzero()[:, 0])
    vae = build_vae(cfg.vae).to(team.device).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    team.say(f"vae: {count(vae) / 1e6:.2f} M parameters, {team.size} x {cfg.vae.batch} pictures a step")
    parameters = list(vae.parameters())
    optimizer = torch.optim.AdamW(
        parameters, lr=cfg.vae.lr, betas=(0.9, 0.99), weight_decay=1e-3, fused=team.device.type == "cuda"
    )
    average = Average(parameters, 0.999)
    cuda = team.device.type == "cuda"
    loss_of = torch.compile(vae_loss, dynamic=False) if cuda else vae_loss
    torch.manual_seed(cfg.seed * 1000 + team.rank)
    budget, step = Budget(team, cfg.vae.seconds), 0
    while (progress := budget.step()) < 1:
        x = source(cfg.vae.batch)
        noise = torch.randn(len(x), LATENT_CHANNELS, 16, 16, device=team.device)
        strength = (
            torch.rand(len(x), 1, 1, 1, device=team.device)
            * 0.25
            * (torch.rand(len(x), 1, 1, 1, device=team.device) < 0.5)
        )
        with torch.autocast(team.device.type, torch.bfloat16, enabled=cuda):
            loss, error = loss_of(vae, x, noise, torch.randn_like(noise) * strength)
        loss.backward()
        team.average([g for p in parameters if (g := p.grad) is not None])
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        for group in optimizer.param_groups:
            group["lr"] = cfg.vae.lr * schedule(progress, step, 100, 0.4, 0.02)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        average.update()
        step += 1
        if step % 500 == 0 or (step % 5 == 0 and not cuda):
            db = -10 * (error / 4).log10().item()
            team.say(f"vae step {step} {budget.elapsed:.0f} s loss {loss.item():.4f} psnr {db:.2f}")
    team.say(f"vae: {step} steps")
    average.swap()
    if team.leads:
        finish(cfg, team, vae.eval(), render, poser, held_out)
    team.close()


if __name__ == "__main__":
    command(main)
