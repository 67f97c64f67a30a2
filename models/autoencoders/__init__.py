"""What the VAEs of the field are called, made of, and stored as.

families.py  the diffusers classes, and the table of published VAEs
layouts.py   other key names than those of diffusers, and configs from shapes
"""
