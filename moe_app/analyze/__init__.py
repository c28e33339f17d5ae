"""Analyses what a model's routers learned; the maths is in `moe_ext.analysis`.

Read in this order: `collect` (passes over text) with `texts`, `capture` and `shard_file`;
`collection` (what was written, checked while it is read); `measures` (tables) and `figures`;
`report` (all of them on a page). `hf_source` opens a Hugging Face directory for `collect`.
"""
