"""What a picture file means: its format, its colours, its depth, its orientation.

formats.py     endings of names, and the formats of Pillow that are read
conversion.py  `Conversion`: what is done to pictures beyond the conversion to 8-bit RGB
pixels.py      any mode of Pillow => 8-bit RGB, or a refusal that names the mode
oddities.py    what should be known of the pictures: transparent, turned by EXIF, 16-bit, animated
"""
