"""Batched forwards of the diffusers and transformers modules, for training.

Same mathematics and same parameters as `Qwen3Model` and `ZImageTransformer2DModel`, but on dense tensors of one padded
caption length: those modules take lists and rebuild masks and complex RoPE tables for each call, which torch.compile
cannot fuse. tests/training/test_batched.py holds both against each other.
"""

from __future__ import annotations

from itertools import pairwise, zip_longest
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

EPS = 1e-5  # of every norm of the transformer


def rms_norm(x: Tensor, weight: Tensor, eps: float = EPS) -> Tensor:
    """RMS norm in fp32, returned in x's dtype."""
    v = x.float()
    return (v * torch.rsqrt(v.pow(2).mean(-1, keepdim=True) + eps) * weight).to(x.dtype)


def encode_text(encoder: Any, ids: Tensor) -> Tensor:
    """`hidden_states[-2]` of Qwen3: ids int64 [B, T] -> [B, T, hidden]. Padding on the right needs no mask."""
    cfg = encoder.config
    x = F.embedding(ids, encoder.embed_tokens.weight)
    cos, sin = text_rope(cfg, ids.shape[1], ids.device)
    for layer in encoder.layers[:-1]:
        x = x + text_attention(
            layer.self_attn, rms_norm(x, layer.input_layernorm.weight, cfg.rms_norm_eps), cos, sin, cfg
        )
        h, mlp = rms_norm(x, layer.post_attention_layernorm.weight, cfg.rms_norm_eps), layer.mlp
        x = x + mlp.down_proj(F.silu(mlp.gate_proj(h)) * mlp.up_proj(h))
    return x


def text_rope(cfg: Any, length: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Cosines and sines [1, 1, T, head_dim] of Qwen3's rotary embedding."""
    theta = cfg.rope_parameters["rope_theta"]
    inverse = 1.0 / (theta ** (torch.arange(0, cfg.head_dim, 2, device=device).float() / cfg.head_dim))
    angles = torch.outer(torch.arange(length, device=device).float(), inverse)
    angles = torch.cat([angles, angles], -1)[None, None]
    return angles.cos(), angles.sin()


def text_attention(attn: Any, h: Tensor, cos: Tensor, sin: Tensor, cfg: Any) -> Tensor:
    """Causal grouped-query attention with RMS-normed queries and keys."""
    b, t, _ = h.shape

    def heads(projected: Tensor) -> Tensor:
        return projected.view(b, t, -1, cfg.head_dim)

    def rotate(x: Tensor) -> Tensor:
        half = cfg.head_dim // 2
        turned = torch.cat([-x[..., half:], x[..., :half]], -1)
        return x.float() * cos + turned.float() * sin

    q = rms_norm(heads(attn.q_proj(h)), attn.q_norm.weight, cfg.rms_norm_eps).transpose(1, 2)
    k = rms_norm(heads(attn.k_proj(h)), attn.k_norm.weight, cfg.rms_norm_eps).transpose(1, 2)
    v = heads(attn.v_proj(h)).transpose(1, 2)
    q, k = rotate(q).to(v.dtype), rotate(k).to(v.dtype)
    groups = cfg.num_attention_heads // cfg.num_key_value_heads
    k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    return attn.o_proj(out.transpose(1, 2).reshape(b, t, -1))


def rope_tables(model: Any, caption: int, height: int, width: int, device: torch.device | str) -> tuple[Tensor, Tensor]:
    """RoPE tables (cos, sin stacked: [2, tokens, head_dim / 2]) of the image and of the caption.

    Caption tokens sit at (1..T, 0, 0), image tokens at (T + 1, row, column); `height` and `width` count tokens.
    """
    text = torch.zeros(caption, 3)
    text[:, 0] = torch.arange(1, caption + 1)
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    image = torch.stack([torch.full_like(rows, caption + 1), rows, columns], -1).view(-1, 3)

    def table(positions: Tensor) -> Tensor:
        parts = []
        for axis, dim in enumerate(model.axes_dims):
            frequency = 1.0 / (model.rope_theta ** (torch.arange(0, dim, 2, dtype=torch.float64) / dim))
            parts.append(torch.outer(positions[:, axis].double(), frequency).float())
        angles = torch.cat(parts, -1)
        return torch.stack([angles.cos(), angles.sin()]).to(device)

    return table(image), table(text)


def apply_rope(x: Tensor, table: Tensor) -> Tensor:
    """Rotate neighbouring pairs: x [B, N, heads, head_dim], table [2, N, head_dim / 2]."""
    a, b = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = table[0][None, :, None], table[1][None, :, None]
    return torch.stack([a * cos - b * sin, a * sin + b * cos], -1).flatten(3)


def block(layer: Any, x: Tensor, rope: Tensor, time: Tensor | None) -> Tensor:
    """One transformer block; `time` [B, adaLN width] is None for the context refiner."""
    attn, b, n = layer.attention, x.shape[0], x.shape[1]
    h = rms_norm(x, layer.attention_norm1.weight)
    gate_attention = gate_ffn = scale_ffn = None
    if time is not None:
        parts = layer.adaLN_modulation(time).unsqueeze(1).chunk(4, 2)
        scale_attention, gate_attention, scale_ffn, gate_ffn = (
            1 + parts[0],
            parts[1].tanh(),
            1 + parts[2],
            parts[3].tanh(),
        )
        h = h * scale_attention
    q = rms_norm(attn.to_q(h).view(b, n, attn.heads, -1), attn.norm_q.weight)
    k = rms_norm(attn.to_k(h).view(b, n, attn.heads, -1), attn.norm_k.weight)
    v = attn.to_v(h).view(b, n, attn.heads, -1)
    q, k = apply_rope(q, rope).to(v.dtype), apply_rope(k, rope).to(v.dtype)
    out = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
    out = rms_norm(attn.to_out[0](out.transpose(1, 2).reshape(b, n, -1)), layer.attention_norm2.weight)
    x = x + (out if gate_attention is None else gate_attention * out)
    h = rms_norm(x, layer.ffn_norm1.weight)
    if scale_ffn is not None:
        h = h * scale_ffn
    ffn = layer.feed_forward
    out = rms_norm(ffn.w2(F.silu(ffn.w1(h)) * ffn.w3(h)), layer.ffn_norm2.weight)
    return x + (out if gate_ffn is None else gate_ffn * out)


def patches(z: Tensor) -> Tensor:
    """Latents [B, C, H, W] as tokens [B, H * W / 4, 4 * C], channels last within a patch."""
    b, c, height, width = z.shape
    h, w = height // 2, width // 2
    return z.view(b, c, h, 2, w, 2).permute(0, 2, 4, 3, 5, 1).reshape(b, h * w, 4 * c)


def control_row(net: Any, condition: Tensor, x: Tensor, rope: Tensor, time: Tensor) -> tuple[Tensor, list[Tensor]]:
    """A ControlNet's layers: the condition as the last one leaves it, and each one's hint. x: what they also see."""
    condition, hints = net.control_layers[0].before_proj(condition) + x, []
    for layer in net.control_layers:
        condition = block(layer, condition, rope, time)
        hints.append(layer.after_proj(condition))
    return condition, hints


def velocity(
    model: Any,
    z: Tensor,
    time: Tensor,
    caption: Tensor,
    real: Tensor,
    ropes: tuple[Tensor, Tensor],
    net: Any = None,
    control: Tensor | None = None,
) -> Tensor:
    """The transformer's output: data minus noise (the pipeline negates it).

    z [B, 16, H, W] noisy latents; time [B] = 1 - sigma; caption [B, T, hidden]; real [B, T], False on padding;
    ropes from `rope_tables`. `net`: a ControlNet of Union 2.0's layout (its layers are also the condition's refiner),
    used as its makers do; `control` [B, channels, H, W] its condition.
    """
    b, c, height, width = z.shape
    h, w = height // 2, width // 2
    image_rope, text_rope = ropes
    embedder = model.t_embedder
    t = embedder.mlp(embedder.timestep_embedding(time * model.t_scale, embedder.frequency_embedding_size)).to(z.dtype)
    x = model.all_x_embedder["2-1"](patches(z))
    condition, hints, places = None, [], []
    if net is not None and control is not None:
        places = net.config.control_layers_places
        condition, hints = control_row(net, net.control_all_x_embedder["2-1"](patches(control)), x, image_rope, t)
    for layer, hint in zip_longest(model.noise_refiner, hints[: len(model.noise_refiner)]):
        x = block(layer, x, image_rope, t)
        x = x if hint is None else x + hint
    text = model.cap_embedder[1](rms_norm(caption, model.cap_embedder[0].weight))
    text = torch.where(real[..., None], text, model.cap_pad_token.to(text.dtype))
    for layer in model.context_refiner:
        text = block(layer, text, text_rope, None)
    joint, rope = torch.cat([x, text.to(x.dtype)], 1), torch.cat([image_rope, text_rope], 1)
    hints = {}
    if condition is not None:
        _, made = control_row(net, torch.cat([condition, text], 1), joint, rope, t)
        hints = dict(zip(places, made))
    for place, layer in enumerate(model.layers):
        joint = block(layer, joint, rope, t)
        joint = joint + hints[place] if place in hints else joint
    final, x = model.all_final_layer["2-1"], joint[:, : h * w]
    x = final.linear(final.norm_final(x) * (1 + final.adaLN_modulation(t)).unsqueeze(1))
    return x.view(b, h, w, 2, 2, c).permute(0, 5, 1, 3, 2, 4).reshape(b, c, height, width)


def sigmas(steps: int, shift: float = 3.0) -> Tensor:
    """Noise levels of `steps` forwards with a static shift, ending in 0: [steps + 1]."""
    s = torch.linspace(1, 1 / steps, steps)
    return torch.cat([shift * s / (1 + (shift - 1) * s), torch.zeros(1)])


@torch.no_grad()
def sample(model: Any, encoder: Any, ids: Tensor, noise: Tensor, steps: int = 8) -> Tensor:
    """Euler sampling without guidance: ids [B, T] padded with 0, noise [B, 16, H, W] -> latents of the same shape."""
    ropes = rope_tables(model, ids.shape[1], noise.shape[2] // 2, noise.shape[3] // 2, noise.device)
    text, levels, z = encode_text(encoder, ids), sigmas(steps).tolist(), noise
    for level, following in pairwise(levels):
        time = torch.full((len(z),), 1 - level, device=z.device)
        z = z + (level - following) * velocity(model, z, time, text, ids != 0, ropes)
    return z
