"""What the VAEs of the field are called, made of, and stored as.

families.py  the diffusers classes, and the table of published VAEs
names.py     what else a published VAE is called
layouts.py   other key names than those of diffusers, and configs from shapes
others.py    autoencoders of other kinds, refused by name
places.py    where the weights of a named VAE lie: hub, folder or file
stored.py    a VAE in a weight file of somebody
"""
