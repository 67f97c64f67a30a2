"""The settings of a run.

schema.py    every setting with its default, unit, range and meaning, but for those of
losses.py    the loss, and of
looking.py   the pictures and metrics of a run while it trains
fields.py    kinds of settings: choices, paths
reading.py   YAML files to nodes, in which every value is still a text
values.py    texts to values of the types of their settings; paths are expanded
load.py      YAML files, `base:` and `key=value` overrides are merged to a checked `Config`
validate.py  which settings are out of range or cannot be used together
resuming.py  which settings a run may change when it goes on from a checkpoint
"""

from utils.config.load import flat, load_config, read_saved_config, to_yaml
from utils.config.schema import Config, per_rank_batch

__all__ = ["Config", "flat", "load_config", "per_rank_batch", "read_saved_config", "to_yaml"]
