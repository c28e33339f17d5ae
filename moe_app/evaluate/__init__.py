"""Evaluates checkpoints with lm-evaluation-harness (extra `eval`).

The harness runs on rank 0 (`harness_model`), which hands its requests to all ranks (`workers`);
`answers` keeps what was computed, so that an interrupted evaluation goes on.
"""
