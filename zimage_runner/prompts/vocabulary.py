"""What other programs call our fields: one table for columns, flags of text lines, experiments and the command line.

``names`` are words that mean one thing wherever they stand. ``letters`` are the flags of kohya-ss/sd-scripts and
musubi-tuner: fields on text lines, and hints elsewhere, where a column ``n`` may as well be a count.
"""

from __future__ import annotations

import re

NAMES: dict[str, tuple[str, ...]] = {
    "text": ("prompt",),
    "seeds": ("seed",),
    "width": ("w", "W"),
    "height": ("h", "H"),
    "num_inference_steps": ("steps", "num_steps", "inference_steps", "sampling_steps"),
    "guidance_scale": ("guidance", "cfg", "cfg_scale", "cfgscale"),
    "negative_prompt": ("negative", "neg_prompt", "negative_prompts", "negativeprompt"),
    "loras": ("lora",),
    "lora_weights": ("lora_weight", "network_mul"),
    "image": ("init_image", "init_img", "image_path", "input_image", "initimage", "file_name"),
    "strength": ("denoising_strength", "denoise", "initimagecreativity"),
    "mask": ("mask_image", "mask_path", "masked_image_path", "maskimage"),
    "mask_blur": ("maskblur",),
    "mask_grow": ("maskgrow",),
    "variation": ("subseed_strength", "variation_strength"),
    "variation_seed": ("subseed",),
    "control_image": ("control_path", "ctrl_img", "conditioning_image"),
    "control_scale": ("control_strength", "controlnet_conditioning_scale"),
    "control_preprocess": ("preprocessor",),
    "control_start": ("control_guidance_start",),
    "control_end": ("control_guidance_end",),
}
"""Field of a prompt to its other names."""
LETTERS = {
    "s": "num_inference_steps",
    "d": "seeds",
    "n": "negative_prompt",
    "no": "negative_prompt",
    "g": "guidance_scale",
    "l": "guidance_scale",
    "am": "lora_weights",
    "i": "image",
    "t": "strength",
    "ci": "control_image",
}
CFG_NAMES = frozenset({"cfg", "cfg_scale", "cfgscale"})
"""Names of ComfyUI's, AUTOMATIC1111's and InvokeAI's number c, where 1 is no guidance. Z-Image's own ``guidance_scale``
g adds g times the difference to the guided prediction, theirs adds c - 1 times: g = c - 1. (The trainers of this
family, musubi-tuner foremost, give g itself in ``--g`` and ``--l``.)"""
OPPOSITES = frozenset({"image_strength", "denoising_start"})
"""mflux's and InvokeAI's numbers of how much of a picture stays: 1 - strength."""
CONFIG_NAMES = {
    "file": "path",
    "filename": "path",
    "folder": "glob",
    "outdir": "root",
    "output_dir": "root",
}
"""Names of fields that no prompt has, for the command line and experiments."""
TOP_NAMES = {
    "o": "output_file",
    "out": "output_file",
    "output_path": "output_file",
    "p": "prompt",
    "text": "prompt",
    "experiments": "experiment",
    "exp": "experiment",
}
"""The same for fields that stand in no group."""
FIELD_OF = {name: field for field, names in NAMES.items() for name in names}
"""Each other name's field."""
PLAIN_NAMES = frozenset({"prompt", "seed", "w", "h", "W", "H"})
"""Other names that need no word of explanation."""


def meant(word: str) -> str | None:
    """The field that a word of another program means, however it is spelt (``CFG Scale``, ``negative-prompt``)."""
    plain = re.sub(r"[\s-]+", "_", word.strip()).lower()
    return plain if plain in NAMES else FIELD_OF.get(plain) or LETTERS.get(plain)


def is_cfg(word: str) -> bool:
    """Return whether the word names other tools' CFG scale c, one more than ``guidance_scale``."""
    return re.sub(r"[\s-]+", "_", word.strip()).lower() in CFG_NAMES


def guidance_of_cfg(cfg: float) -> float:
    """``guidance_scale`` for other tools' CFG scale; from 1 down, where they draw without guidance, 0."""
    return max(0.0, cfg - 1.0)


def cfg_hint(word: str) -> str:
    """What to say after the name of our field where ``word`` is other tools' CFG scale."""
    return " (one less: other tools' CFG scale 1 is guidance_scale 0)" if is_cfg(word) else ""


def in_our_words(word: str, value: str) -> str:
    """The value for our field of what was typed for ``word``; only a CFG scale is another number."""
    try:
        return f"{guidance_of_cfg(float(value)):g}" if is_cfg(word) else value
    except ValueError:
        return value
