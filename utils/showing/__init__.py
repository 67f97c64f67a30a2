"""What a user sees of a run while it trains; nothing here trains.

summary.py   the block of facts at the start, which --dry-run prints too
bar.py       the progress bar, and its lines in a log file
trackers.py  tensorboard and wandb: curves and pictures, in the run's folder
commands.py  the commands at the end, that sample and evaluate the last checkpoint
"""
