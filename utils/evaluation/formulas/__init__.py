"""The mathematics of the metrics: arrays in, numbers out; no files, no networks, no processes.

frechet.py      means and covariances, and the Frechet distance between them
manifolds.py    precision and recall
scores.py       the Inception Score and the Kernel Inception Distance
uncertainty.py  the standard errors of these
pictures.py     PSNR and SSIM of reconstructions; statistics of latents
"""
