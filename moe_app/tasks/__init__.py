"""Scores the answers of fixed questions with a model that trains: items, rows of tokens, passes."""
