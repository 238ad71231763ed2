"""Which row belongs to which sample, where the user says it, against brute force."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import unpack_sequence

from backpack import backpack, extend, extensions, mark
from tests.idioms.compare import Comparison
from tests.idioms.reference import Expanded, Truth
from tests.row_cases import (
    ADJACENCY,
    CASES,
    EDGES,
    GCN,
    GRAPH,
    NODES,
    SIZES,
    Multiplied,
    RowCase,
    data,
    mlp,
    scatter,
)
from tests.row_graphs import GRAPH_CASES
from tests.row_ragged import RAGGED_CASES


def _of(*names: str) -> tuple:
    return tuple(getattr(extensions, name)() for name in names)


GROUPS = {
    "first": _of("BatchGrad", "BatchL2Grad", "SumGradSquared", "Variance"),
    "ggn": _of("DiagGGNExact", "BatchDiagGGNExact", "SqrtGGNExact", "GGNMP"),
    "hessian": _of("DiagHessian", "BatchDiagHessian", "HMP"),
}


ALL = CASES | GRAPH_CASES | RAGGED_CASES


def targets(rows: int) -> Tensor:
    return torch.arange(rows) % 2


def truth_of(case: RowCase, model: nn.Module) -> Truth:
    """By plain autograd: the model is not extended yet."""
    output = case.run(model)
    owner = torch.tensor(case.owner).repeat_interleave(output.shape[1])
    at = Expanded(dict(model.named_parameters()), [output], owner, case.samples)
    return Truth(at, lambda outputs: F.cross_entropy(outputs[0], targets(len(outputs[0]))))


Moments = dict[str, tuple[str, Tensor]]


def moments(case: RowCase, model: nn.Module) -> Moments:
    """Second moments of what meets each weight, with the bias that is added to the product.

    Sums over all rows and uses, divided by the number of samples.
    """
    found: Moments = {}

    def add(weight: str, bias: str, rows: Tensor) -> None:
        rows = rows.reshape(-1, rows.shape[-1])
        before = found[weight][1] if weight in found else 0
        found[weight] = bias, before + rows.T @ rows / case.samples

    def listen(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
            if isinstance(module, nn.RNNBase):
                if module.num_layers == 1 and not module.bidirectional:
                    for sequence in sequences_of(module, args[0]):
                        add(f"{name}.weight_ih_l0", f"{name}.bias_ih_l0", sequence.detach())
                        if len(args) == 1:  # it begins with zeros
                            states = before(module, sequence)
                            add(f"{name}.weight_hh_l0", f"{name}.bias_hh_l0", states)
                return
            rows = args[0].detach()
            if isinstance(module, nn.Conv2d):
                assert not isinstance(module.padding, str)
                rows = F.unfold(rows, module.kernel_size, 1, module.padding, module.stride).mT
            if isinstance(module, nn.Conv1d):
                assert not isinstance(module.padding, str)
                size, padding = (1, *module.kernel_size), (0, *module.padding)
                rows = F.unfold(rows.unsqueeze(2), size, 1, padding, (1, *module.stride)).mT
            add(f"{name}.weight", f"{name}.bias", rows)

        return hook

    kinds = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.RNNBase)
    layers = [(name, module) for name, module in model.named_modules() if isinstance(module, kinds)]
    handles = [module.register_forward_pre_hook(listen(name)) for name, module in layers]
    case.run(model)
    for handle in handles:
        handle.remove()
    return found


def sequences_of(module: nn.RNNBase, x: Any) -> list[Tensor]:
    if not isinstance(x, Tensor):
        return unpack_sequence(x)
    if x.dim() == 2:
        return [x]
    return list(x if module.batch_first else x.transpose(0, 1))


def before(module: nn.RNNBase, sequence: Tensor) -> Tensor:
    """Hidden states before each step of a sequence."""
    hooks, module._forward_pre_hooks = module._forward_pre_hooks, OrderedDict()
    hidden = module(sequence[None])[0][0] if module.batch_first else module(sequence)[0]
    module._forward_pre_hooks = hooks
    return torch.cat([torch.zeros_like(hidden[:1]), hidden[:-1]]).detach()


def test_readout_above_the_model() -> None:
    """However it is written, it is that product with a matrix."""
    matrix = F.one_hot(GRAPH).T.double()
    ways: list[Callable[[Tensor], Tensor]] = [
        lambda h: matrix @ h,
        lambda h: torch.zeros(3, 2).to(h).index_add(0, GRAPH, h),
        lambda h: torch.zeros(3, 2).to(h).scatter_add(0, GRAPH[:, None].expand_as(h), h),
        lambda h: scatter(h, GRAPH, 3),
    ]
    found = []
    for pool in ways:
        torch.manual_seed(0)
        model = extend(mlp().double())
        exts = _of("BatchGrad", "DiagGGNExact", "KFLR", "DiagHessian")
        with backpack(*exts):
            F.cross_entropy(pool(model(mark(NODES.clone(), GRAPH))), targets(3)).backward()
        fields = [ext.savefield for ext in exts]
        found.append([list(getattr(p, f)) for p in model.parameters() for f in fields])
    for each in found[1:]:
        torch.testing.assert_close(each, found[0])


def test_segments() -> None:
    """Torch differentiates sums over segments once only."""
    found = []
    for pool in (
        lambda h: scatter(h, GRAPH, 3, "mean"),
        lambda h: torch.segment_reduce(h, "mean", lengths=SIZES),
    ):
        torch.manual_seed(0)
        model = Multiplied(torch.matmul, pool).double()
        extend(model, samples=lambda x, adjacency: (x, GRAPH))
        with backpack(*_of("BatchGrad", "DiagGGNExact", "KFLR")):
            F.cross_entropy(model(NODES, ADJACENCY), targets(3)).backward()
        found.append([(p.grad_batch, p.diag_ggn_exact, *p.kflr) for p in model.parameters()])
    torch.testing.assert_close(*found)


def test_a_matrix_that_joins_graphs() -> None:
    model = Multiplied(torch.matmul, lambda h: scatter(h, GRAPH, 3)).double()
    extend(model, samples=lambda x, adjacency: (x, GRAPH))
    joining = ADJACENCY.clone()
    joining[0, 4] = 1
    for matrix in (joining, joining.to_sparse()):
        with pytest.raises(RuntimeError, match="samples"), backpack(extensions.BatchGrad()):
            model(NODES, matrix).sum().backward()


def test_an_edge_between_graphs() -> None:
    model = CASES["GCN"].model().double()
    CASES["GCN"].say(model)
    loss = model(NODES, torch.cat([EDGES, torch.tensor([[0], [4]])], 1), GRAPH).sum()
    with pytest.raises(RuntimeError, match="samples"), backpack(extensions.BatchGrad()):
        loss.backward()


def test_rows_that_are_not_marked_are_constants() -> None:
    """Features of edges with a layer of their own."""

    class Edged(GCN):
        def __init__(self) -> None:
            super().__init__()
            self.edge = nn.Linear(2, 2)

        def forward(self, x: Tensor, edges: Tensor, batch: Tensor, features: Tensor) -> Tensor:
            h = self.second(self.first(x).tanh())
            messages = h[edges[0]] * self.edge(features).tanh()
            h = torch.zeros_like(h).index_add(0, edges[1], messages)
            return self.head(torch.zeros(3, 2).to(h).index_add(0, batch, h))

    features = data(EDGES.shape[1], 2, seed=11)
    torch.manual_seed(1)
    model = Edged().double()
    case = RowCase(Edged, lambda m: m(NODES, EDGES, GRAPH, features), [0, 1, 2], 3)
    truth = truth_of(case, model)
    whose = GRAPH[EDGES[0]]
    for samples in (
        lambda x, edges, batch, features: (x, batch),
        lambda x, edges, batch, features: [(x, batch), (features, whose)],
    ):
        extend(model, samples=samples)
        outcome = Comparison(
            truth, model, lambda: F.cross_entropy(case.run(model), targets(3)).backward()
        ).outcome(GROUPS)
        assert not any(outcome.values()), outcome


@pytest.mark.parametrize("name", ALL)
def test_quantities(name: str) -> None:
    case = ALL[name]
    torch.manual_seed(1)
    model = case.model().double()
    truth, inputs = truth_of(case, model), moments(case, model)
    case.say(model)
    lossfunc = extend(nn.CrossEntropyLoss())

    def backward() -> None:
        output = case.run(model)
        lossfunc(output, targets(len(output))).backward()

    outcome = Comparison(truth, model, backward, options=case.options).outcome(GROUPS)
    assert not any(outcome.values()), outcome
    with backpack(extensions.KFLR(), extensions.KFAC(mc_samples=2), **case.options):
        backward()
    for name_of_weight, (name_of_bias, A) in inputs.items():
        weight, bias = model.get_parameter(name_of_weight), model.get_parameter(name_of_bias)
        B = truth.ggn[name_of_bias]
        torch.testing.assert_close(weight.kflr[0], B)
        torch.testing.assert_close(weight.kflr[1], A)
        torch.testing.assert_close(weight.kfac[1], A)
        torch.testing.assert_close(bias.kflr[0], B)
