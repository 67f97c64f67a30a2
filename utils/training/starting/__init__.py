"""What a new run begins with: how the networks of `run.init_from` become those of the run.

fitting.py      whether a checkpoint is whole and has the shapes of the run's networks
learned.py      a checkpoint that a new run begins with: what it is, and what its run has recorded
parts.py        classes, projectors and position table: what fits, and what is new
inheritance.py  all of it, in words and in numbers
"""
