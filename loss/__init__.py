"""Objectives: values in, one unweighted scalar out; the weights are applied in train_repae.py."""
