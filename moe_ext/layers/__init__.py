"""Holds dense parts of a layer: norm, linear layers, positions, output layer, products.

Attention, routers and experts have rooms of their own.
"""
