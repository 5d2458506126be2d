"""What a run will draw: prompts x seeds as work items. No torch, and no I/O."""

from zimage_runner.plan.build import CountTokens, FindInputs, FindLoras, build_plan
from zimage_runner.plan.fingerprint import Fingerprints, fingerprint
from zimage_runner.plan.items import Bucket, Encoding, WorkItem, item_encodings, slug
from zimage_runner.plan.plan import Duplicate, Plan, Truncation

__all__ = [
    "Bucket",
    "CountTokens",
    "Duplicate",
    "Encoding",
    "FindInputs",
    "FindLoras",
    "Fingerprints",
    "Plan",
    "Truncation",
    "WorkItem",
    "build_plan",
    "fingerprint",
    "item_encodings",
    "slug",
]
