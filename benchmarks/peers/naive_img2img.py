"""The naive loop from a picture: what a person writes after reading diffusers' page of its img2img pipeline."""

# pyright: reportPrivateImportUsage=false, reportAttributeAccessIssue=false
from __future__ import annotations

from pathlib import Path

from phases import Phases, arguments, draw, synchronize

args = arguments()
clock = Phases(args.out)

import torch  # noqa: E402
from diffusers import ZImageImg2ImgPipeline  # noqa: E402
from diffusers.utils import load_image  # noqa: E402

clock.lap("import")
pipe = ZImageImg2ImgPipeline.from_pretrained(args.model, torch_dtype=torch.bfloat16)
clock.lap("from_pretrained")
pipe.to(args.device)
synchronize(torch, args.device)
clock.lap("to_device")

picture = load_image(str(Path(__file__).parents[2] / "conf" / "pictures" / "cat.png")).resize((args.size, args.size))
draw(args, clock, torch, pipe, image=picture, strength=0.6)
