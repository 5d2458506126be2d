"""Libraries that load themselves when first used, loaded in the background instead."""

from __future__ import annotations

import logging
import threading

import torch
import torch.nn.functional as F

log = logging.getLogger(__name__)


def wake_decoder(dtype: torch.dtype) -> threading.Thread:
    """Load cuDNN's convolutions, which takes a quarter of a second, while the caption is encoded and denoised.

    The article's step 4 does the same in the foreground, where it gains nothing.
    """
    thread = threading.Thread(target=_convolve, args=(dtype,), name="wake-decoder", daemon=True)
    thread.start()
    return thread


@torch.inference_mode()
def _convolve(dtype: torch.dtype) -> None:
    try:
        x = torch.zeros(1, 64, 8, 8, device="cuda", dtype=dtype).to(memory_format=torch.channels_last)
        F.conv2d(x, x.new_zeros(64, 64, 3, 3), padding=1)
    except RuntimeError as error:  # the decoder will say what is wrong
        log.debug("no convolution beforehand: %s", error)
