"""Generate text and compute log-probabilities with a trained model, under any layout.

Read in this order: `sampling` (the choice of a token), `decode` (the loop around it), `scoring`
(log-probabilities of given tokens), `parallel_model` (a forward pass over all ranks).
"""
