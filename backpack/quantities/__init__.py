"""Quantities: small functions of forms.

In: the form of a parameter. Out: the value saved on it, and how values of batches combine.
"""
