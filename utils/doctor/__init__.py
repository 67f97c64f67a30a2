"""The checks before a run: scripts/doctor.py prints what they find.

examination.py   all checks in their order, and what one hands to the next
findings.py      what one check says: ok, warn or FAIL, and a sentence
machine.py       packages, GPUs and precision, loader workers against cores and shared memory
data.py          the data source, cached latents, a few images read
shapes.py        batch against ranks, EMA against steps, latents, tokens and features against each
                 other
weights.py       every weight file is here or can be downloaded
run_folder.py    what the run resumes from, changed settings, disk for its checkpoints
memory.py        memory of one rank, the settings that make a step fit, time on this CPU
"""
