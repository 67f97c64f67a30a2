"""Metrics of samples against a reference, and of a VAE's reconstructions.

options.py           how images, feature networks and metrics are asked for; `Options`
metrics.py           the tables of metrics: what each needs, its names, the function behind it
formulas.py          their mathematics: Frechet distance, precision and recall, SSIM ...
evaluate.py          samples against a reference => a record; which metrics can be computed
reconstruction.py    a VAE's reconstructions against their originals => a record
image_sets.py        opens images by name: folders, data sources, subsets; reads ahead
npz_images.py        what a set of images offers; images in .npz, .npy and arrays
networks.py          Inception, DINOv2, timm networks, pixels: uint8 images => features
statistics.py        images => mean, covariance and rows of their features, on any number of ranks
reference.py         the reference: images, or statistics in a file or in the cache
report.py            what numbers are called, which are comparable to papers, the printed table
"""
