"""Tokens on disk, the order they are read in, and the batches they become.

From the bottom up: `indexed` (verify and map one file), `writer` (write one), `permutation` and
`source` (which window is sample n), `blend` (which source is next), `phases` (which blend, and the
counts a checkpoint keeps), `stream` (batches of one data parallel rank), `build` (all of it from a
DataConfig). `sharing` says what of a batch a rank sees; `jsonl`, `tokenizer` and `entropy` stand
beside them. No order is stored on disk: sample n is computed from the seed, so there is no index
cache to build, to share or to trust.
"""
