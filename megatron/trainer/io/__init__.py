"""Reading and writing of files that every room needs: bounded reads, atomic writes, hashes.

Knows no format; formats are in checkpoint/, data/, hf_files/ and records/.
"""
