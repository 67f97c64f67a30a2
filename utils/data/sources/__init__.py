"""The kinds of data that can be named as data.source; their table is utils/data/registry.py.

folder.py   images in a folder: class folders, or labels in a file
classes.py  which class each image of a folder or an archive belongs to
packed.py   raw pixels packed by scripts/prepare_data.py: the reader and the writer
hdf5.py     the official REPA-E layout, images.h5
members.py  image files inside archives: where each lies, and how it is read there
zipped.py   images in a zip, read in place
tarred.py   images in tars: WebDataset, or folders as they were packed
parquet.py  images in parquet files of Hugging Face's layout, to be packed
shards.py   which of several files belong to a part (split) of the data
toy.py      scikit-learn's digits, and noise for benchmarks
"""
