"""Predict what a layout needs and exchanges: activations, memory, collectives, step time.

The planner's cost model: it describes a step without running it, and tests check it against
measured runs.
"""
