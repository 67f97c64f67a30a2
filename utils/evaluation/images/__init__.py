"""Images to be evaluated: sets of one size in a fixed order, read block by block.

naming.py      how images are named on the command line
beside.py      the record of sample_ddp.py beside a file of samples
npz_images.py  what a set of images offers; images in .npz, .npy and arrays
image_sets.py  opens images by name: folders, data sources, subsets
reader.py      reads images ahead in threads; memory from which a GPU takes them
"""
