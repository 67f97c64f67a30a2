"""Weight files: where one is published, how it is read, and how its numbers come into a network.

published.py  one published file: where it comes from, where a copy of it may lie
hub.py        names of repositories as users write them, and folders of the hub's cache
reading.py    what a file holds, and the state dict of one network in it; no code is run
finding.py    the tensors of a network in nested dicts and under prefixes, found by known keys
archives.py   PyTorch's files: zip archives, TorchScript, the format before 1.6
tensors.py    tensors, built of their bytes in a file
pickles.py    a pickle read as data, without calling anything that it names
objects.py    what stands for the objects of a pickle: plain values, or a placeholder
headers.py    the shapes in a weight file without its numbers; a .safetensors written in pieces
loading.py    numbers into a network, strictly
configs.py    the config.json beside the weights
"""
