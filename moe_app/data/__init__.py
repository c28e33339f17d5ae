"""Commands that make training data: corpus, tokenizer, token files.

Reading them while training is in `megatron.trainer.data`.
"""
