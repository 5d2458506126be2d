"""The naive loop with ``device_map``: weights go straight to the GPU."""

# pyright: reportPrivateImportUsage=false, reportAttributeAccessIssue=false
from __future__ import annotations

from phases import Phases, arguments, synchronize

args = arguments()
clock = Phases(args.out)

import torch  # noqa: E402
from diffusers import ZImagePipeline  # noqa: E402

clock.lap("import")
pipe = ZImagePipeline.from_pretrained(args.model, torch_dtype=torch.bfloat16, device_map=args.device)
synchronize(torch, args.device)
clock.lap("from_pretrained")

prompts = args.prompts.read_text(encoding="utf-8").splitlines()
for n in range(args.images):
    image = pipe(
        prompts[n % len(prompts)],
        height=args.size,
        width=args.size,
        num_inference_steps=args.steps,
        guidance_scale=0.0,
    ).images[0]
    clock.lap("first_image" if n == 0 else "later_images")
    image.save(args.out / f"{n:03d}.png")
    clock.lap("first_png" if n == 0 else "later_pngs")
    clock.write(torch, args.device)
