"""AdamW, its checkpoint form, learning-rate schedules, and the wrapping of a model for training.

The step that uses them is `megatron.trainer.step`.
"""
