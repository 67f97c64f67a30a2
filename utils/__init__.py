"""Everything around the method: what runs, reads, writes, samples and measures.

Files here are the ground of all folders below:

samplers.py     sampling from a SiT: solvers, guidance and its default interval
checkpoint.py   what a checkpoint holds, how it is written and read, which ones are kept
random.py       one random generator for each key, e.g. (seed, step, rank)
distributed.py  ranks: start, gather, "the main process does it, all get the result", stop signals
precision.py    autocast and TF32
files.py        atomic writes, hashes, JSON, locks, disk space
provenance.py   versions of libraries, commit of this repository
cli.py          the argument parser of every script, and user errors as one line

config/      the settings of a run
data/        data sources, cached latents, latent statistics, the loader
sampling/    sampling settings, images of a checkpoint
evaluation/  metrics of samples and of VAEs
pictures/    grids and figures
training/    the networks of a run, its batches, logs, previews, evaluations and plan
doctor/      checks before a run
paper/       the paper's tables and the study on digits
published/   import of published weights, export of VAEs

What may import what is checked by tests/test_house.py: from above downwards, never in a circle.
"""
