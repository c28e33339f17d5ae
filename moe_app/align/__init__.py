"""Aligns a model with preferences: DPO and KTO against a frozen reference."""
