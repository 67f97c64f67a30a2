"""Objectives: values in, one unweighted scalar out, in float32 or more. The weights are applied in
train_repae.py. Nothing here loads a network or reads a file.

alignment.py       REPA: cosine similarity of SiT tokens and encoder features; their normalisation
diffusion.py       the velocity loss of the SiT
gan.py             both sides of the adversarial loss, and LeCam regularisation
interpolant.py     the path between data and noise, its velocity and score, the times that are drawn
reconstruction.py  the VAE's own losses: pixels, LPIPS, KL
"""
