"""Trains megatron-core models: the application that its wheel lacks.

Read in this order: `config` (what can be set), `runtime.launch` (process groups, device, seed),
`step` (one forward-backward-update), `loop` (the run), `checkpoint` (what survives it).
"""
