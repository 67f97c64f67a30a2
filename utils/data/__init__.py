"""Images for training and evaluation: where they come from, and how a step gets its batch.

base.py          `Source`, the class that every data source extends; broken images, fingerprints of
                 content
labels.py        the class of each image: files of labels in every layout, class numbers
registry.py      every source by its name; opening one, also from command-line arguments
listing.py       the images below a folder: one rule for all that read one
content.py       sha256 of what files hold; kept for files that stay the same
images.py        decoding, cropping, value ranges
sampling.py      which images each step takes, and the loader that reads them
training.py      what a run trains on: the images or their cached latents, in the order of its steps
latents.py       latents cached by scripts/cache_latents.py: the reader
latent_writer.py the same: the writer
latent_stats.py  mean and std of a VAE's latents
sharded.py       arrays on disk in numbered shards: the resumable writer, and the reader

decoding/       what a picture file means: formats, colours, depth, orientation
sources/         the kinds of data: folders, archives, packed pixels, HDF5, parquet, digits, noise
"""
