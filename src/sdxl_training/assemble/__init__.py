"""The composition root: the only place that sees the whole configuration and every layer below it."""

from sdxl_training.assemble.caching import cache
from sdxl_training.assemble.drawing import draw_prompts, export, sample
from sdxl_training.assemble.planning import PlanFiles, plan, write_demo_data
from sdxl_training.assemble.tag_command import tags
from sdxl_training.assemble.training import train

__all__ = ["PlanFiles", "cache", "draw_prompts", "export", "plan", "sample", "tags", "train", "write_demo_data"]
