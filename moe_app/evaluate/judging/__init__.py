"""Lets another model judge what a model answers."""
