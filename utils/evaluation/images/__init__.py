"""Images to be evaluated: sets of one size in a fixed order, read block by block.

naming.py      how images are named on the command line
npz_images.py  what a set of images offers; images in .npz, .npy and arrays
image_sets.py  opens images by name: folders, data sources, subsets; reads ahead
"""
