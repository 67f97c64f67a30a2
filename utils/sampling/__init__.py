"""From a checkpoint to images on disk, for sample_ddp.py and for pictures in training.

settings.py  every setting of sampling with its default: flags, checks and JSON derive from it
images.py    the noise and label of image i, and the images of a range of indices
load.py      a checkpoint that is sampled from: its configs, hashes, networks
output.py    finished blocks on disk, and NAME.npz with what lies beside it
"""
