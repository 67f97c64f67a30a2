"""Everything around the method: what runs, reads, writes, samples and measures.

Files here are the ground of all folders below:

samplers.py     sampling from a SiT: solvers, guidance and its default interval
checkpoint.py   what a checkpoint holds, which ones of a run are kept, which one it begins from
sealed.py       a checkpoint folder is written whole or not at all; its state.json vouches for it
run_lock.py     one writer for a run's folder
random.py       one random generator for each key, e.g. (seed, step, rank)
distributed.py  ranks: start, gather, "the main process does it, all get the result", stop signals
precision.py    autocast and TF32
compilation.py  torch.compile, with or without CUDA graphs
files.py        atomic writes, hashes, JSON, locks, disk space, `~` in paths
records.py      typed records: ranges of fields, JSON files read as dataclasses
provenance.py   versions of libraries, commit of this repository
cli.py          the frame of every script: arguments, signals, errors as one line

process/     how a program ends, signals, ranks that watch each other; below the files here
config/      the settings of a run
data/        data sources, cached latents, latent statistics, the loader
sampling/    sampling settings, images of a checkpoint
evaluation/  metrics of samples and of VAEs
pictures/    grids and figures
showing/     what a user sees of a run: the block at the start, the bar, trackers, the last commands
training/    the networks of a run, its batches, logs, previews, evaluations and plan
cost/        what a step costs, counted on tensors without content: memory, time
benchmark/   what a step costs, measured
doctor/      checks before a run
paper/       the paper's tables and the study on digits
published/   import of published weights, export of VAEs
pipeline/    a diffusers pipeline of SiT and VAE, and its export
report/      report.html of one or several runs

What may import what is checked by tests/test_house.py: from above downwards, never in a circle.
"""

import models  # noqa: F401  ends a Python that is too old
