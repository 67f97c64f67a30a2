"""Vision encoders of other people: what they are called, made of, and stored as.

files.py     the weight file of an encoder: a file, or the one of a folder
layouts.py   other key names than those that timm reads
loading.py   timm's networks, empty or with the weights of a file
matching.py  whether a file is of the network asked for, by its tensors and the config beside it
names.py     the names by which publishers and papers call the encoders of the table
table.py     the table of encoders: what each is, and how it is fed and read
"""
