"""Custom modules against the expressions they stand for."""

import copy
import pickle
from collections import OrderedDict

import pytest
import torch
from torch import nn
from torch.fx import GraphModule
from torch.nn import functional as F

from backpack.custom_module.branching import Parallel, SumModule
from backpack.custom_module.graph_utils import BackpackTracer
from backpack.custom_module.pad import Pad
from backpack.custom_module.permute import Permute
from backpack.custom_module.reduce_tuple import ReduceTuple
from backpack.custom_module.scale_module import ScaleModule
from backpack.custom_module.slicing import Slicing

CASES = [
    (SumModule(), lambda x: x),
    (ScaleModule(), lambda x: x),
    (ScaleModule(weight=-0.5), lambda x: -0.5 * x),
    (Permute(0, 2, 1), lambda x: x.mT),
    (Permute(0, -1, 1), lambda x: x.mT),
    (Permute(-3, 1, 2), lambda x: x),
    (Permute(1, 2, init_transpose=True), lambda x: x.mT),
    (Permute(-1, -2, init_transpose=True), lambda x: x.mT),
    (Permute(0, -3, init_transpose=True), lambda x: x),
    (Pad((1, 2)), lambda x: F.pad(x, (1, 2))),
    (Pad([1, 0, -1, 2], value=3.0), lambda x: F.pad(x, (1, 0, -1, 2), value=3.0)),
    (Pad((1, 1), mode="reflect", value=1.0), lambda x: F.pad(x, (1, 1), mode="reflect")),
    (Slicing((slice(None), slice(0, 3, 2))), lambda x: x[:, 0:3:2]),
    (Slicing((slice(None), 1, ...)), lambda x: x[:, 1]),
    (Slicing(slice(1, None)), lambda x: x[1:]),
    (Parallel(nn.Identity()), lambda x: x),
    (Parallel(nn.Tanh(), ScaleModule(2.0), nn.ReLU()), lambda x: x.tanh() + 2 * x + x.relu()),
    (Parallel(nn.Tanh(), nn.ReLU(), merge_module=nn.Bilinear(3, 3, 1)), None),
]


@pytest.mark.parametrize(
    "module, expected", CASES, ids=[type(m).__name__ + str(i) for i, (m, _) in enumerate(CASES)]
)
def test_forward_and_copies(module, expected):
    x = torch.rand(2, 4, 3)
    result = module(x)
    if expected is not None:
        assert not list(module.parameters())
        torch.testing.assert_close(result, expected(x))
    for twin in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert torch.equal(twin(x), result)
        assert repr(twin) == repr(module)


def test_sum_module():
    x, y = torch.rand(2, 3), torch.rand(2, 1)
    torch.testing.assert_close(SumModule()(x, y, x), 2 * x + y)
    with pytest.raises(ValueError, match="nothing to sum"):
        SumModule()()


@pytest.mark.parametrize("index", [0, 1, -1])
def test_reduce_tuple(index):
    values = (torch.rand(1), torch.rand(2), torch.rand(3))
    assert ReduceTuple(index=index)(values) is values[index]
    assert ReduceTuple()(values) is values[0]


def test_parallel_names_and_merge():
    first, second = nn.Linear(3, 2), nn.Linear(3, 2)
    x = torch.rand(4, 3)
    by_position = Parallel(first, second)
    by_name = Parallel(OrderedDict(a=first, b=second), merge_module=nn.CosineSimilarity())
    assert set(by_position.state_dict()) == {"0.weight", "0.bias", "1.weight", "1.bias"}
    assert set(by_name.state_dict()) == {"a.weight", "a.bias", "b.weight", "b.bias"}
    assert isinstance(by_position.merge_module, SumModule)
    torch.testing.assert_close(by_position(x), first(x) + second(x))
    torch.testing.assert_close(by_name(x), F.cosine_similarity(first(x), second(x)))


def test_parallel_runs_a_shared_branch_twice():
    layer, x = nn.Linear(3, 2), torch.rand(4, 3)
    torch.testing.assert_close(Parallel(layer, layer)(x), 2 * layer(x))


@pytest.mark.parametrize("args", [(), (OrderedDict(),), (OrderedDict(merge_module=nn.ReLU()),)])
def test_parallel_errors(args):
    with pytest.raises(ValueError, match="Parallel"):
        Parallel(*args)


@pytest.mark.parametrize("weight", [1, True, "1", torch.tensor(1.0)])
def test_scale_module_takes_floats_only(weight):
    with pytest.raises(ValueError, match="must be a float"):
        ScaleModule(weight=weight)


@pytest.mark.parametrize(
    "dims, transpose",
    [((1, 0, 2), False), ((-1, 1, 0), False), ((), False), ((0, 1), True), ((2, 0), True)],
)
def test_permute_keeps_the_sample_axis(dims, transpose):
    with pytest.raises(ValueError, match="axis 0"):
        Permute(*dims, init_transpose=transpose)


def test_permute_keeps_the_sample_axis_when_called():
    swap = Permute(-1, -2, init_transpose=True)
    assert swap(torch.rand(2, 4, 3)).shape == (2, 3, 4)
    with pytest.raises(ValueError, match="axis 0"):
        swap(torch.rand(4, 3))
    with pytest.raises(ValueError, match="two axes"):
        Permute(0, 1, 2, init_transpose=True)


def test_tracer_keeps_custom_modules_whole():
    model = nn.Sequential(
        Parallel(nn.Linear(3, 4), nn.Linear(3, 4)),
        nn.LSTM(4, 3, batch_first=True),
        ReduceTuple(),
        Permute(-1, -2, init_transpose=True),
        ScaleModule(2.0),
        Pad((1, 0)),
        Slicing((slice(None), 0)),
    )
    graph = BackpackTracer().trace(model)
    calls = [node.target for node in graph.nodes if node.op == "call_module"]
    assert calls == [str(position) for position in range(7)]
    x = torch.rand(2, 5, 3)
    torch.testing.assert_close(GraphModule(model, graph)(x), model(x))
