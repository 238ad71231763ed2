"""Capture: the forward pass of an extended model, seen operation by operation.

In: calls of extended modules. Out: taps, model outputs and losses, noted on the autograd graph.
"""
