"""The engine: one backward pass inside a ``with`` block.

In: a block's quantities, and a call of ``backward``. Out: fields on parameters.
"""
