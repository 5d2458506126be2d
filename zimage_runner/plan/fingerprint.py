"""Identity of pictures: sha256 over everything that decides one."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from zimage_runner.plan.items import WorkItem
from zimage_runner.prompts.base import Prompt
from zimage_runner.sampling import SamplingParams

FINGERPRINT_VERSION = 1


class Fingerprints:
    """Identity of pictures: items with equal fingerprints are the same picture, in whichever run they were drawn."""

    def __init__(self, weights_digest: str, numerics: Mapping[str, Any]) -> None:
        common = {"version": FINGERPRINT_VERSION, "weights": weights_digest, "numerics": dict(numerics)}
        self._common = _canonical(common)
        self._params: dict[SamplingParams, bytes] = {}
        self._last: tuple[Prompt, SamplingParams] | None = None
        self._prefix = hashlib.sha256()

    def __call__(self, item: WorkItem) -> str:
        """sha256 in hex. Consecutive items of one prompt share the work."""
        if self._last is None or item.prompt is not self._last[0] or item.params is not self._last[1]:
            self._last = (item.prompt, item.params)
            text = item.prompt.text.encode()
            # The length keeps text and seed from running into each other.
            self._prefix = hashlib.sha256(b"%s%s%d %s" % (self._common, self._encode(item.params), len(text), text))
        full = self._prefix.copy()
        full.update(b"\n%d" % item.seed)
        return full.hexdigest()

    def _encode(self, params: SamplingParams) -> bytes:
        if params not in self._params:
            self._params[params] = _canonical(_what_counts(params))
        return self._params[params]


def fingerprint(item: WorkItem, weights_digest: str, numerics: Mapping[str, Any]) -> str:
    """One item's fingerprint; for many use ``Fingerprints``."""
    return Fingerprints(weights_digest, numerics)(item)


def _what_counts(params: SamplingParams) -> dict[str, Any]:
    """The sampling fields that decide the picture: guidance's own fields count only when it is on."""
    values = params.to_dict()
    if not params.uses_guidance:
        for name in ("negative_prompt", "cfg_normalization", "cfg_truncation"):
            del values[name]
    # 4 and 4.0 are the same guidance.
    counts = {name: float(v) if isinstance(v, float) or name == "guidance_scale" else v for name, v in values.items()}
    if params.loras:
        counts["loras"] = [[lora.digest, float(lora.weight)] for lora in params.loras]
    if params.inputs:
        counts["inputs"] = params.inputs.counts()
    return counts


def _canonical(value: Any) -> bytes:
    """JSON that depends on nothing but the value; a newline ends it, so that parts cannot run into each other."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True).encode() + b"\n"
