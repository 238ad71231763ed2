"""The door for operations, losses, sources of columns and quantities of your own.

Everything that code outside the library builds on is imported from here; the files behind it may move.

* An operation: :func:`op_rule`, a function from its arguments to forms (:class:`Outer`,
  :class:`Lookup`, :class:`Dense`; :func:`reduce_to` makes one for a tensor that was broadcast).
* A loss: :func:`loss_rule`, a function from its arguments to its Hessian (:func:`elementwise`, or a
  subclass of :class:`LossHessian`).
* A source of columns: a subclass of :class:`ColumnSource`.
* A quantity: a subclass of :class:`BackpropExtension`. One that keeps forms meets the others too:
  :class:`Sum`, :class:`Scaled`, :class:`Pullback` (which needs the graph), and :class:`Patches` in an
  :class:`Outer`.
"""

from backpack.forms.at_output import AtOutput
from backpack.forms.base import Dense, Form
from backpack.forms.layout import Layout, Patches
from backpack.forms.lookup import Lookup
from backpack.forms.outer import Outer
from backpack.forms.several import Pullback, Scaled, Together
from backpack.forms.sums import Sum
from backpack.graph.nodes import kind_of, walk
from backpack.graph.tracing import axis_at
from backpack.losses.base import LossHessian, loss_rule
from backpack.losses.elementwise import elementwise
from backpack.quantities.base import BackpropExtension, Context
from backpack.quantities.combining import (
    Added,
    Blocks,
    Counted,
    Functions,
    Joined,
    Moments,
    Never,
    Rule,
)
from backpack.quantities.reading import Reader
from backpack.rules.base import ParameterForms, op_rule
from backpack.rules.elementwise import reduce_to
from backpack.samples.axis import SampleAxis, sample_axis_of
from backpack.sources.columns import Columns, ColumnSource, LossPiece, Pass, Wanted
from backpack.sources.table import (
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
    "Reader",
    "Rule",
    "Never",
    "Moments",
    "Joined",
    "Functions",
    "Counted",
    "Blocks",
    "Added",
    "AtOutput",
    "AveragedRoot",
    "BackpropExtension",
    "SampleAxis",
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
    "ParameterForms",
    "Pass",
    "Patches",
    "Pullback",
    "RandomSigns",
    "SampledRoot",
    "Scaled",
    "Sum",
    "Together",
    "Wanted",
    "axis_at",
    "kind_of",
    "walk",
    "sample_axis_of",
    "elementwise",
    "loss_rule",
    "op_rule",
    "reduce_to",
]
