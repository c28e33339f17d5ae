"""What a layout needs and exchanges: activations, memory, collectives, time; the planner's model.

Describes a step without running it, and is held to measured runs.
"""
