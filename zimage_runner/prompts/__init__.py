"""Where prompts come from. ``read_prompts(source)`` gives the list that a run is made of."""

from zimage_runner.prompts.base import Prompt, PromptSource
from zimage_runner.prompts.select import read_prompts

__all__ = ["Prompt", "PromptSource", "read_prompts"]
