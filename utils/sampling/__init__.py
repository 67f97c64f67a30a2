"""From a checkpoint to images on disk, for sample_ddp.py and for pictures in training.

settings.py  every setting of sampling with its default: flags, checks and JSON derive from it
noise.py     the noise of image i, counter-based, on any device
images.py    the label of image i, and the images of a range of indices
locate.py    the checkpoint that a run's folder or a hub id means
labels.py    names of classes, and the label that a name means
load.py      a checkpoint that is sampled from: its configs, hashes, networks
background.py  a thread that writes finished blocks while the next one is made
png.py       samples as single images with a list of their labels
output.py    finished blocks on disk, and NAME.npz with what lies beside it
"""
