"""Many batches: values of a data set, and of micro-batches.

In: an iterable of batches, or several backward passes. Out: the values of all of them together.
"""
