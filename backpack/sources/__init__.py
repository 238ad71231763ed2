"""Sources: where columns come from.

In: a loss and the graph below it. Out: columns at the model's outputs, or inside it.
"""
