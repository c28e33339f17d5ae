"""Keeps a long run alive: preflight, watchdog, stragglers, step guard, rules for stopping.

What a run writes about itself is in `megatron.trainer.records`.
"""
