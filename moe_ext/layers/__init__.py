"""Dense parts of a layer: norm, linear layers, positions, output layer, products and gradients.

Attention, routers and experts have rooms of their own.
"""
