"""The door for operations, losses, sources of columns and quantities of your own.

Everything that code outside the library builds on is imported from here; the files behind it may move.

* An operation: :func:`op_rule`, a function from its arguments to forms (:class:`Outer`,
  :class:`Lookup`, :class:`Dense`; :func:`reduce_to` makes one for a tensor that was broadcast).
* A loss: :func:`loss_rule`, a function from its arguments to its Hessian (:func:`elementwise`, or a
  subclass of :class:`LossHessian`).
* A source of columns: a subclass of :class:`ColumnSource`.
* A quantity: a subclass of :class:`BackpropExtension`. One that keeps forms meets the others too:
  :class:`Sum`, :class:`Pullback` (which needs the graph), and :class:`Patches` in an :class:`Outer`.
"""

from backpack.batch import Batch, batch_of
from backpack.columns import Columns, ColumnSource, LossPiece, Pass, Wanted
from backpack.combining import Added, Blocks, Counted, Functions, Joined, Moments, Never, Rule
from backpack.factors import Dense, Form, Layout, Lookup, Outer, Patches, Pullback, Sum, Together
from backpack.losses import LossHessian, elementwise, loss_rule
from backpack.quantities import BackpropExtension, Context
from backpack.rules import Pairs, op_rule, reduce_to
from backpack.sources import (
    AveragedRoot,
    ExactRoot,
    HessianRoot,
    LeadingRoot,
    LossGradient,
    OutputBasis,
    RandomSigns,
    SampledRoot,
)

__all__ = [
    "Rule",
    "Never",
    "Moments",
    "Joined",
    "Functions",
    "Counted",
    "Blocks",
    "Added",
    "AveragedRoot",
    "BackpropExtension",
    "Batch",
    "ColumnSource",
    "Columns",
    "Context",
    "Dense",
    "ExactRoot",
    "Form",
    "HessianRoot",
    "Layout",
    "LeadingRoot",
    "Lookup",
    "LossGradient",
    "LossHessian",
    "LossPiece",
    "Outer",
    "OutputBasis",
    "Pairs",
    "Pass",
    "Patches",
    "Pullback",
    "RandomSigns",
    "SampledRoot",
    "Sum",
    "Together",
    "Wanted",
    "batch_of",
    "elementwise",
    "loss_rule",
    "op_rule",
    "reduce_to",
]
