"""Where the samples sit: the sample axis of every tensor of the forward pass.

In: tensors, operations and what the user says about samples. Out: the axis of a result, or that the
operation mixes samples.
"""

# Importing the package fills its table.
from backpack.samples import contractions, indexing, packing, reductions, segments, writes

__all__ = ["contractions", "indexing", "packing", "reductions", "segments", "writes"]
