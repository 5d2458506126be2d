"""diffusers as its documentation tunes it: cuDNN attention, compiled blocks, VAE in channels_last."""

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
if args.device == "cuda":
    pipe.transformer.set_attention_backend("_native_cudnn")
pipe.transformer.compile_repeated_blocks(fullgraph=True, dynamic=False)
pipe.vae.to(memory_format=torch.channels_last)
pipe.set_progress_bar_config(disable=True)
clock.lap("prepare")

draw(args, clock, torch, pipe)
