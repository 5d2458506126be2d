"""The naive loop: what a person writes after reading the model card. Baseline of every comparison."""

# pyright: reportPrivateImportUsage=false, reportAttributeAccessIssue=false
from __future__ import annotations

from phases import Phases, arguments, draw, synchronize

args = arguments()
clock = Phases(args.out)

import torch  # noqa: E402
from diffusers import ZImagePipeline  # noqa: E402

clock.lap("import")
pipe = ZImagePipeline.from_pretrained(args.model, torch_dtype=torch.bfloat16)
clock.lap("from_pretrained")
pipe.to(args.device)
synchronize(torch, args.device)
clock.lap("to_device")

draw(args, clock, torch, pipe)
