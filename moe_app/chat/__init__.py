"""Turns conversations into training samples: rows, templates, masks, packing, a cache of tokens.

`show_data` prints what a model would see of a file; fine-tuning and alignment read the same.
"""
