"""The kinds of data that can be named as data.source; their table is utils/data/registry.py.

folder.py   images in a folder, one subfolder for each class
packed.py   raw pixels packed by scripts/prepare_data.py: the reader and the writer
hdf5.py     the official REPA-E layout, images.h5
toy.py      scikit-learn's digits, and noise for benchmarks
"""
