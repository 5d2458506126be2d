"""The naive loop with ``device_map``: weights go straight to the GPU."""

# pyright: reportPrivateImportUsage=false, reportAttributeAccessIssue=false
from __future__ import annotations

from phases import Phases, arguments, draw, synchronize

args = arguments()
clock = Phases(args.out)

import torch  # noqa: E402
from diffusers import ZImagePipeline  # noqa: E402

clock.lap("import")
pipe = ZImagePipeline.from_pretrained(args.model, torch_dtype=torch.bfloat16, device_map=args.device)
synchronize(torch, args.device)
clock.lap("from_pretrained")

draw(args, clock, torch, pipe)
