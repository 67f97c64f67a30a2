"""A process among others: what ends it, what it says then, and which files are its own. Nothing
here needs torch.

ending.py        a user's mistake as one line with exit code 2; errors are said once by all ranks
signals.py       SIGTERM, SIGINT, SIGUSR1, and the death of the launcher
heartbeat.py     ranks watch each other, wait for each other, and agree where to stop
installation.py  which packages this Python lacks, in one line
written.py       what this program has written itself, and may therefore write over
"""
