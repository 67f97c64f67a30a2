"""The published sizes of SiT, as arguments of `models.sit.SiT`.

A module of its own that imports nothing, so that a config can be checked without importing torch.
"""

_SHAPES = {
    "S": {"hidden_size": 384, "depth": 12, "num_heads": 6},
    "B": {"hidden_size": 768, "depth": 12, "num_heads": 12},
    "L": {"hidden_size": 1024, "depth": 24, "num_heads": 16},
    "XL": {"hidden_size": 1152, "depth": 28, "num_heads": 16},
}

SIZES = {
    f"SiT-{name}/{patch}": {**shape, "patch_size": patch}
    for name, shape in _SHAPES.items()
    for patch in (1, 2, 4, 8)
}
