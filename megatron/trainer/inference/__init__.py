"""Text and log-probabilities from a trained model, under any layout.

Read in this order: `sampling` (the choice of a token), `decode` (the loop around it), `scoring`
(log-probabilities of given tokens), `staged` (a pass over a model that is spread over ranks).
"""
