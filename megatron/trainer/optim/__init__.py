"""Provides AdamW, its checkpoint form, learning-rate schedules, and wraps models for training.

The step that uses them is `megatron.trainer.step`.
"""
