"""A diffusers pipeline of a checkpoint, and its export without this repository.

pipeline.py    RepaePipeline: what a user loads and calls here
standalone.py  the pipeline itself, which is also the code of exported folders
arguments.py   its arguments: labels, ranges, choices
seeds.py       generators of torch as seeds, and the noise that they mean
bundle.py      one Python file out of several of this repository
sources.py     the two files of code in an exported folder
export.py      the folder as a whole (scripts/export_pipeline.py)
model_card.py  its README.md
"""
