"""Runs programs that a model wrote, each in a sandbox of its own."""
