"""The autograd graph: what is noted on it, walks over it, columns carried through it.

In: nodes of a recorded forward pass. Out: taps, the way from a loss to them, products with Jacobians.
"""
