"""What surrounds the training step of train_repae.py.

networks.py           the record of all networks; how they are built, loaded, made ready to train
trained_network.py    one network with its optimizer, gradient averages and loss scale; sharding
batch.py              the images of one step; micro-batches, averages over them; loader to device
draws.py              the random numbers of one step
ema.py                moving average of the SiT
nonfinite.py          what follows numbers that are not finite; steps left out; warnings
tracking.py           metrics.jsonl, trackers, progress bar; a loss that is not finite ends the run
periodic.py           what happens between steps: log line, checkpoint, preview, evaluation
preview.py            pictures of samples and reconstructions
online_evaluation.py  small evaluations of the EMA weights
plan.py               what --dry-run prints
phases.py             named ranges of the step, for profilers, counters and clocks
"""
