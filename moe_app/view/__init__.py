"""Shows runs: terminal view, HTML page, report.

Reading of run directories is in `megatron.trainer.records`.
"""
