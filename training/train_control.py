"""Train a ControlNet of edges for the embedded model: `python -m training.train_control control.device=cuda`.

The embedded model draws the pictures, so nothing is downloaded. They are turned, moved and made smaller, so that edges
say what the caption does not. Only the ControlNet learns; its blocks begin as copies of the transformer's, its
projections as zeros. Layout: Union 2.0 with the latents' 16 channels, used as its makers do.
"""

from __future__ import annotations

# The types that diffusers and torch declare here are narrower than what they take.
# pyright: reportPrivateImportUsage=false, reportArgumentType=false
import random
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, ZImageTransformer2DModel
from diffusers.models.controlnets.controlnet_z_image import ZImageControlNetModel
from safetensors.torch import save_file
from torch import Tensor

from training.batched import rope_tables, velocity
from training.captions import COLORS
from training.config import TrainingConfig, command
from training.latents import make_encoder
from training.lexicon import read_yaml
from training.models import LATENT_CHANNELS
from training.render import pose_matrix, poses
from training.train_transformer import LATENT_SIDE, noise_levels
from zimage_runner.engines.native.assembly import load_model
from zimage_runner.engines.native.model import Options
from zimage_runner.pictures.canny import canny

CAPTION = 32  # padded tokens; longer captions are left out
STEPS = 8
AT_ONCE = 16
WARMUP = 50


@dataclass(frozen=True, slots=True)
class Pool:
    """What is learnt from: latents and edges' latents [N, 16, 16, 16], captions [N, 32, hidden], False on padding."""

    latents: Tensor
    edges: Tensor
    captions: Tensor
    real: Tensor


def captions(count: int, rng: random.Random) -> list[str]:
    """Everyday things, half of them in a colour or on a coloured background."""
    names = [name for label, words in read_yaml("aliases.yaml").items() for name in (label, *words["en"])]
    forms = ["{name}", "a {name}", "a {color} {name}", "a {name} on a {color} background"]
    return [rng.choice(forms).format(name=rng.choice(names), color=rng.choice(COLORS)) for _ in range(count)]


def posed(pictures: Tensor) -> Tensor:
    """Pictures [B, 3, H, W], each mirrored or not, tilted, 55 to 105 % large and moved; the border fills the rest."""
    count, device = len(pictures), pictures.device

    def between(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(count, device=device)

    scale = between(0.55, 1.05)
    room = (1.1 - scale).clamp(min=0.05)
    pose = poses(between(-1, 1).sign(), between(-0.4, 0.4), scale, room * between(-1, 1), room * between(-1, 1))
    grid = F.affine_grid(pose_matrix(pose), list(pictures.shape), align_corners=False)
    return F.grid_sample(pictures, grid, padding_mode="border", align_corners=False)


def make_pool(cfg: TrainingConfig) -> Pool:
    """Draw pictures with the model for a while, give each several poses and find their edges."""
    control, start = cfg.control, time.time()
    model = load_model(Path(control.model), Options(device=control.device))
    vae: Any = AutoencoderKL.from_pretrained(control.model, subfolder="vae", torch_dtype=torch.float32)
    encode = make_encoder(vae.to(control.device))
    rng = random.Random(cfg.seed)
    parts: list[tuple[Tensor, ...]] = []
    edges_of = ThreadPoolExecutor(8)
    while (drawn := sum(len(part[0]) for part in parts)) < control.pictures * control.poses:
        if parts and time.time() - start > control.draw_seconds:
            break
        if len(parts) % (16 * control.poses) == 0:
            print(f"{drawn} drawn and encoded after {time.time() - start:.0f} s", flush=True)
        embeds = [e for e in model.encode(captions(AT_ONCE, rng), 512) if len(e) <= CAPTION]
        seeds = [torch.Generator().manual_seed(rng.randrange(2**31)) for _ in embeds]
        noise = torch.stack([torch.randn(LATENT_CHANNELS, LATENT_SIDE, LATENT_SIDE, generator=g) for g in seeds])
        pixels = model.decode(model.denoise(embeds, noise, STEPS)).wait()
        own = torch.from_numpy(pixels).to(control.device).permute(0, 3, 1, 2).float()
        padded = torch.stack([torch.cat([e, e.new_zeros(CAPTION - len(e), e.shape[1])]) for e in embeds])
        real = torch.stack([torch.arange(CAPTION) < len(e) for e in embeds])
        for _ in range(control.poses):
            pictures = posed(own)
            bytes_ = pictures.round().byte().permute(0, 2, 3, 1).cpu().numpy()
            found = edges_of.map(lambda picture: torch.from_numpy(canny(picture, *control.thresholds)), bytes_)
            edges = torch.stack(list(found))
            edges = edges.to(control.device).permute(0, 3, 1, 2).float()
            parts.append((encode(pictures / 127.5 - 1), encode(edges / 127.5 - 1), padded, real))
    pool = Pool(*(torch.cat(column).clone().to(control.device) for column in zip(*parts)))
    print(f"{len(pool.latents)} pictures drawn and encoded in {time.time() - start:.0f} s", flush=True)
    return pool


def build(transformer: Any, places: list[int]) -> Any:
    """A ControlNet whose blocks are copies of the transformer's."""
    config = transformer.config
    sizes = {name: config[name] for name in ("dim", "n_refiner_layers", "n_heads", "n_kv_heads", "norm_eps")}
    net: Any = ZImageControlNetModel(
        control_layers_places=places, control_refiner_layers_places=list(range(config.n_refiner_layers)),
        control_in_dim=LATENT_CHANNELS, add_control_noise_refiner="control_layers", **sizes,
    )  # fmt: skip
    for place, layer in zip(places, net.control_layers):
        layer.load_state_dict(transformer.layers[place].state_dict(), strict=False)
    net.control_all_x_embedder.load_state_dict(transformer.all_x_embedder.state_dict())
    return net


def main(cfg: TrainingConfig) -> None:
    """Draw, train, save."""
    control = cfg.control
    torch.manual_seed(cfg.seed)
    torch.set_float32_matmul_precision("high")
    pool = make_pool(cfg)
    transformer: Any = ZImageTransformer2DModel.from_pretrained(
        control.model, subfolder="transformer", torch_dtype=torch.float32
    )
    transformer.to(control.device).requires_grad_(False)
    net = build(transformer, control.places).to(control.device)
    optimizer = torch.optim.AdamW(net.parameters(), lr=control.lr, betas=(0.9, 0.98), weight_decay=0.01)
    ropes = rope_tables(transformer, CAPTION, LATENT_SIDE // 2, LATENT_SIDE // 2, control.device)
    start, step, losses, saved = time.time(), 0, [], 0.0
    while (done := (time.time() - start) / control.seconds) < 1:
        for group in optimizer.param_groups:
            group["lr"] = control.lr * min(1.0, (step + 1) / WARMUP, 2.5 * (1 - done) + 0.02)
        rows = torch.randint(len(pool.latents), (control.batch,), device=control.device)
        z, edges, text, real = (part[rows] for part in (pool.latents, pool.edges, pool.captions, pool.real))
        sigma, noise = noise_levels(len(z), z.device), torch.randn_like(z)
        level = sigma[:, None, None, None]
        given = (transformer, (1 - level) * z + level * noise, 1 - sigma, text, real, ropes)
        loss = (velocity(*given, net, edges) - (z - noise)).square().mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.detach())
        step += 1
        if step % control.report == 0:
            print(f"step {step}, {100 * done:.0f} %: loss {torch.stack(losses).mean():.4f}", flush=True)
            losses.clear()
            if done - saved > 0.2:
                saved = done
                save(net, control.out, step)  # whoever ends it has something
    save(net, control.out, step)


def save(net: Any, path: str, step: int) -> None:
    """Write the file that ``model.controlnet`` names."""
    save_file({name: value.detach().cpu().bfloat16().contiguous() for name, value in net.state_dict().items()}, path)
    print(f"{path}: {Path(path).stat().st_size / 1e6:.1f} MB after {step} steps", flush=True)


if __name__ == "__main__":
    command(main)
