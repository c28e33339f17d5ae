"""Scores programs that a model wrote, by running them."""
