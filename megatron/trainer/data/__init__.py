"""Reads tokens from disk, in an order computed from the seed, into the batches of each rank.

From the bottom up: `indexed` (verify and map a file), `writer` (write one), `permutation` and
`source` (which window is sample n), `blend` (which source is next), `sampler` (which blend),
`phase_records` (what a checkpoint keeps of both), `batch` (micro-batches), `read_ahead` (in a
thread), `stream` and `validation` (batches of one data parallel rank), `data_path` and `build` (all
of it from a DataConfig), `describe` (its table). `batch_views` takes a rank's part of a batch;
`jsonl`, `tokenizer` and `entropy` stand beside them. No order is stored on disk, so there is no
index cache to build, to share or to trust. What a model does with a batch is not here.
"""
