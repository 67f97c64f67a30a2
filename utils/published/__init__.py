"""Weights of other people in, and weights of ours out.

files.py             what a published file or folder holds, in whatever wrappers
other_generators.py  generators of other projects, to be refused by name
networks.py          a SiT or discriminator from the names and shapes of its tensors
sit_conventions.py   whether t = 0 or t = 1 is data; from the original SiT's conventions to ours
importing.py         a published file as a checkpoint directory (scripts/import_official.py)
exporting.py         the VAE of a checkpoint as a diffusers folder (scripts/export_vae.py)
model_card.py        the README.md of an exported VAE
"""
