"""Nodes of the autograd graph: walks over them, and what kinds of operations add curvature.

In: nodes. Out: nodes, each once. The table here is the only one of its kind.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence

from torch.autograd.graph import Node

from backpack._torch import leaf_of

# What forward-mode derivatives put in.
IDENTITY = "torch::autograd::Identity"
# Linear and piecewise linear operations, by the names of their nodes: they add no curvature.
LINEAR = frozenset(
    """Add Sub Rsub Neg View UnsafeView ReshapeAlias Reshape Permute Transpose T Expand Squeeze
    Unsqueeze Sum Mean Cat Stack Split SplitWithSizes Unbind Select Slice Narrow Index IndexSelect
    Gather Clone Copy ToCopy AsStrided Alias Flip Roll Repeat Unfold Im2Col Col2Im PixelShuffle
    PixelUnshuffle Relu LeakyRelu Threshold Hardtanh Hardsigmoid Clamp
    ClampMin ClampMax Abs MaxPool2DWithIndices MaxPool3DWithIndices MaxPool1D MaxPool2D MaxPool3D
    AvgPool2D AvgPool3D AdaptiveAvgPool2D AdaptiveAvgPool3D AdaptiveMaxPool2D AdaptiveMaxPool3D
    MkldnnAdaptiveAvgPool2D UpsampleNearest1D UpsampleNearest2D UpsampleNearest3D UpsampleLinear1D
    UpsampleBilinear2D UpsampleBicubic2D UpsampleTrilinear3D ConstantPadNd ReflectionPad1D
    ReflectionPad2D ReflectionPad3D ReplicationPad1D ReplicationPad2D ReplicationPad3D NativeDropout
    PreluKernel Where MaskedFill MaskedSelect Max Min Amax Amin Diagonal Rrelu RreluWithNoise Tril Triu
    Cumsum IndexAdd IndexPut Scatter ScatterAdd Swapaxes Movedim NllLoss NllLoss2D Take Conj
    ConjPhysical ViewAsReal ViewAsComplex Complex FftR2C FftC2C FftC2R
    NestedGetValues NestedViewFromJagged""".split()
) | {IDENTITY}
# Products, linear as long as only one of their arguments depends on the data.
PRODUCTS = frozenset("Mul Div Mm Bmm Mv Dot Addmm Addbmm Baddbmm Addmv Convolution".split())
# Operations that may pick other entries the next time.
PICKING = frozenset(
    """Index IndexSelect Gather IndexPut IndexAdd Scatter ScatterAdd MaskedSelect MaskedFill Take Where
    Sort Topk""".split()
)
# Curved, but sums of functions of single entries.
TERMWISE = frozenset(
    """MseLoss SmoothL1Loss HuberLoss SoftMarginLoss BinaryCrossEntropy
    BinaryCrossEntropyWithLogits""".split()
)
# Functions of entries at the same place, some of which may be constants, and norms of the last axes.
ENTRYWISE = TERMWISE | frozenset(
    """Mul Div Pow Atan2 Hypot Maximum Minimum Fmax Fmin Fmod Remainder Addcmul Addcdiv Lerp Xlogy
    Xlog1Py Logaddexp Logaddexp2 L1Loss NativeLayerNorm NativeGroupNorm""".split()
)
# Linear in evaluation mode.
BATCH_NORMS = frozenset({"NativeBatchNorm", "CudnnBatchNorm", "MiopenBatchNorm"})


def kind_of(node: Node) -> str:
    """The name of a node's operation.

    Torch's own nodes are numbered (``MulBackward0``). A custom ``autograd.Function`` that is called
    ``Mul`` has ``MulBackward``, and keeps that as the name of its kind: it may be nothing like torch's.
    """
    name = node.name()
    own = name.rstrip("0123456789")
    return own.removesuffix("Backward") if own != name else name


def is_linear(node: Node) -> bool:
    """Whether an operation is linear or piecewise linear, in complex numbers as pairs of real ones."""
    kind = kind_of(node)
    return kind in LINEAR and (kind != "Abs" or not _of_complex(node))


def _of_complex(node: Node) -> bool:
    """Whether an argument of an operation is complex."""
    for child, number in node.next_functions:
        if child is not None:
            leaf = leaf_of(child)
            if (child._input_metadata[number] if leaf is None else leaf).dtype.is_complex:
                return True
    return False


def children_of(node: Node) -> list[Node]:
    """The nodes right below one, those of its operation's arguments."""
    return [child for child, _ in node.next_functions if child is not None]


Below = Callable[[Node], Sequence[Node]]


def walk(starts: Iterable[Node], below: Below = children_of) -> Iterator[Node]:
    """Nodes at ``starts`` and below, each once.

    ``below`` gives those to go on to from a node, which the caller has seen by then.
    """
    stack = list(starts)
    seen = set(stack)
    while stack:
        node = stack.pop()
        yield node
        for child in below(node):
            if child not in seen:
                seen.add(child)
                stack.append(child)


def upwards(starts: Iterable[Node], below: Below = children_of) -> list[Node]:
    """Nodes at ``starts`` and below, each after all those below it."""
    done: dict[Node, None] = {}
    entered: set[Node] = set()
    stack = [(node, False) for node in starts]
    while stack:
        node, leaving = stack.pop()
        if leaving:
            done[node] = None
        elif node not in entered:
            entered.add(node)
            stack.append((node, True))
            stack += [(child, False) for child in below(node)]
    return list(done)
