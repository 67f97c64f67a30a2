"""Weight files: where one is published, how it is read, and how its numbers come into a network.

published.py  one published file: where it comes from, where a copy of it may lie
reading.py    what a file holds: tensors and plain values, and no code
loading.py    numbers into a network, strictly
configs.py    the config.json beside the weights
"""
