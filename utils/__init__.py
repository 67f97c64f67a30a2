"""Plumbing: configuration, data, checkpoints, distribution, sampling, metrics."""
