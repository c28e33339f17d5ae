"""Reads and writes files for every room: bounded reads, atomic writes, hashes.

Knows no format; formats are in checkpoint/, data/, hf_files/ and records/.
"""
