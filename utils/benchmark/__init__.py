"""What a run costs, measured on the machine at hand, for scripts/benchmark.py.

flags.py     the command line: what belongs together, and what does not
clock.py     the time of each phase of a step, without waiting for the device inside it
machine.py   the device: its name, its memory, its matrix products, counted FLOPs
training.py  steps of training: networks with random weights, images made up or real
sampling.py  images per second of a SiT and a VAE
loading.py   images per second of the data loader
report.py    results on the screen, and as JSON
compare.py   two results beside each other; imports no torch
"""
