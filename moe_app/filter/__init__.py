"""Filters and deduplicates documents before they are tokenized.

What a filter decides is in plain functions (`rules`, `overlap`, `first_occurrences`); `pipeline/`
makes datatrove's steps of them and alone needs datatrove, which the extra `data` installs.
"""
