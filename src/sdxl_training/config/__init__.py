"""The configuration: five sections, read and checked without torch."""

from sdxl_training.config.load import LoadedConfig, load_config, write_resolved
from sdxl_training.config.objective_checks import notes
from sdxl_training.config.problems import ConfigError, Problem
from sdxl_training.config.schema import Config

__all__ = ["Config", "ConfigError", "LoadedConfig", "Problem", "load_config", "notes", "write_resolved"]
