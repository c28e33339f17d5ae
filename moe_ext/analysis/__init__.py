"""Measures what routers do, from the experts that they chose: pure maths on arrays.

Every accumulator counts in integers, takes tokens in portions of any size and merges with others,
so that a result depends neither on batches nor on how tokens were spread over ranks. Chosen experts
are [t, k] in the order of their gates, the largest first; equal gates are in the order of the
experts' numbers. Letters: t tokens, k experts per token, e experts, v token ids.
"""
