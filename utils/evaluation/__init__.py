"""Metrics of samples against a reference, and of a VAE's reconstructions.

options.py           how feature networks and metrics are asked for; `Options`
metrics.py           the tables of metrics: what each needs, its names, the function behind it
evaluate.py          samples against a reference => a record; which metrics can be computed
reconstruction.py    a VAE's reconstructions against their originals => a record
networks.py          Inception, DINOv2, timm networks, pixels: uint8 images => features
statistics.py        images => mean, covariance and rows of their features, on any number of ranks
reference.py         the reference: images, or statistics in a file or in the cache
comparable.py        which numbers may stand beside published ones, and why the others may not
report.py            what numbers are called, the printed table
table.py             several sets of samples against one reference, in one table

formulas/    the mathematics: Frechet distance, precision and recall, SSIM ...
images/      opens images by name, reads them ahead
references/  statistics of references in files
"""
