"""Joins lm-evaluation-harness, which the extra `eval` installs, to the project's models."""
