"""Trains variants of a recipe under several seeds and compares them with published findings."""
