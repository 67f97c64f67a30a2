"""What surrounds the training step of train_repae.py.

networks.py           the record of all networks; how they are built, loaded, made ready to train
trained_network.py    one network with its optimizer, gradient averages and loss scale; sharding
batch.py              the images of one step; micro-batches, averages over them; loader to device
draws.py              the random numbers of one step
ema.py                moving average of the SiT
nonfinite.py          what follows numbers that are not finite; steps left out; warnings
tracking.py           metrics.jsonl, and the trackers; a loss that is not finite ends the run
sessions.py           the starts of a run
periodic.py           what happens between steps: log line, checkpoint, preview, evaluation
online_evaluation.py  small evaluations of the EMA weights
plan.py               whether a run can do what its settings ask for; what --dry-run prints
starting/             how the networks of run.init_from become those of a new run
phases.py             named ranges of the step, for profilers, counters and clocks
"""
