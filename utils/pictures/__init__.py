"""Figures: of latents, of samples as training goes on, of the solvers' errors, and tables.

grid.py      rows of images with a title each, as one PNG
pca.py       latent maps as colours, by their first three principal components
latents.py   the latents of several VAEs side by side, with figures
samples.py   the first images of sample_ddp.py, with their names
preview.py   pictures during training: samples, reconstructions, latents
nearest.py   samples beside the training images that are most like them
progress.py  the same samples from several checkpoints of a run
table.py     a table of text, as of several sets of samples
solvers.py   error of each ODE solver against its number of network calls
"""
