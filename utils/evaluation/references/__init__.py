"""Statistics of references in files: what others publish, and what was computed here before.

files.py    which statistics a file holds, who made it, and whether they can be true
pickles.py  dicts and arrays out of a pickle, of which nothing is executed
known.py    published files by their sha256, and what the names of others tell
cache.py    statistics that were computed here
"""
