"""Testing: the same numbers by brute force.

In: a model, a loss, data. Out: every quantity by plain autograd, and a comparison.
"""
