"""Rules: from an operation in which a parameter meets data to the form of its Jacobian.

In: an operation's arguments. Out: pairs of a parameter and a function from columns to a form.
"""

# Importing the package fills its table.
from backpack.rules import convolution, einsum, elementwise, linear, lookup, normalization, recurrent

__all__ = ["convolution", "einsum", "elementwise", "linear", "lookup", "normalization", "recurrent"]
