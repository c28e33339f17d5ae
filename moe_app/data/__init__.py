"""Make training data: the commands for corpus, tokenizer and token files.

Reading them while training is in `megatron.trainer.data`.
"""
