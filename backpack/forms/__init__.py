"""Forms: ``J^T`` applied to columns, in the factored shape that an operation has, and its algebra.

In: what an operation saved, and columns at its output. Out: Gram matrices, norms, sums of squares,
Kronecker factors, products, without writing out a gradient per sample.
"""
