"""Weights of other people in, and weights of ours out.

files.py            what a published file holds; the restricted unpickling
networks.py         a VAE, SiT or discriminator from the names and shapes of its tensors
sit_conventions.py  from the conventions of the original SiT release to those of REPA-E
importing.py        a published file as a checkpoint directory (scripts/import_official.py)
exporting.py        the VAE of a checkpoint as a diffusers folder (scripts/export_vae.py)
model_card.py       the README.md of an exported VAE
"""
