"""The settings of a run.

schema.py    every setting with its default, unit, range and meaning
ranges.py    how the schema declares the range of a number
load.py      YAML files, `base:` and `key=value` overrides are merged to a checked `Config`
validate.py  which settings are out of range or cannot be used together
"""

from utils.config.load import flat, load_config, read_saved_config, to_yaml
from utils.config.schema import Config, per_rank_batch

__all__ = ["Config", "flat", "load_config", "per_rank_batch", "read_saved_config", "to_yaml"]
