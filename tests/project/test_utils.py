"""Small helpers: sub-sampling, parameter vectors, module classes, examples."""

import sys
from types import ModuleType

import pytest
import torch
from torch import nn
from torch.func import functional_call, jacrev
from torch.fx import symbolic_trace
from torch.nn.utils import parameters_to_vector

from backpack.custom_module.branching import Parallel, SumModule
from backpack.custom_module.reduce_tuple import ReduceTuple
from backpack.utils import examples
from backpack.utils.convert_parameters import vector_to_parameter_list
from backpack.utils.module_classification import is_loss, is_nll, is_no_op
from backpack.utils.subsampling import subsample


@pytest.mark.parametrize("dim", [0, 1, -1])
@pytest.mark.parametrize("indices", [[0], [2, 0, 2], [-1, 1], [], torch.tensor([1, -2])])
def test_subsample(dim, indices):
    tensor = torch.rand(3, 4, 3)
    expected = tensor.movedim(dim, 0)[indices].movedim(0, dim)
    assert torch.equal(subsample(tensor, dim=dim, subsampling=indices), expected)


def test_subsample_nothing_and_errors():
    tensor = torch.rand(3, 2)
    assert subsample(tensor) is tensor
    for index in (3, -4):
        with pytest.raises(IndexError, match=f"index {index} .* 3 samples"):
            subsample(tensor, subsampling=[0, index])
    for mask in ([True, False, True], torch.tensor([True, False, True])):
        with pytest.raises(TypeError, match="mask"):
            subsample(tensor, subsampling=mask)


def test_vector_to_parameter_list():
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Linear(4, 1), nn.LSTM(1, 2))
    params = list(model.parameters())
    vector = parameters_to_vector(params).detach()
    parts = vector_to_parameter_list(vector, model.parameters())
    assert isinstance(parts, list)
    assert all(torch.equal(a, b) for a, b in zip(parts, params, strict=True))
    parts[0].zero_()
    assert vector[:18].count_nonzero() == 0, "parts are views"
    for wrong in (vector[1:], torch.cat([vector, vector]), vector.unsqueeze(0)):
        with pytest.raises(ValueError, match=f"{len(vector)} entries"):
            vector_to_parameter_list(wrong, params)


@pytest.mark.parametrize(
    "module, loss, nll, no_op",
    [
        (nn.CrossEntropyLoss(), True, True, False),
        (nn.MSELoss(), True, True, False),
        (nn.BCEWithLogitsLoss(), True, True, False),
        (nn.PoissonNLLLoss(), True, True, False),
        (nn.HingeEmbeddingLoss(), True, False, False),
        (nn.Linear(1, 1), False, False, False),
        (SumModule(), False, False, False),
        (nn.Sequential(), False, False, True),
        (Parallel(nn.Identity()), False, False, True),
        (ReduceTuple(), False, False, True),
        (symbolic_trace(nn.ReLU()), False, False, True),
    ],
    ids=lambda value: type(value).__name__,
)
def test_module_classification(module, loss, nll, no_op):
    assert (is_loss(module), is_nll(module), is_no_op(module)) == (loss, nll, no_op)


def dense_hessian(function):
    return jacrev(jacrev(function))


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("freeze", [False, True])
def test_diag_ggn_exact(reduction, freeze):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)).double()
    model[0].weight.requires_grad_(not freeze)
    lossfunc = nn.CrossEntropyLoss(reduction=reduction)
    X, y = torch.rand(5, 3, dtype=torch.float64), torch.randint(3, (5,))

    params = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    blocks = jacrev(lambda values: functional_call(model, values, (X,)))(params)
    J = torch.cat([block.flatten(start_dim=2) for block in blocks.values()], dim=2)
    J = J.flatten(end_dim=1)
    H = dense_hessian(lambda f: lossfunc(f, y))(model(X).detach()).reshape(15, 15)
    ggn = J.T @ H @ J

    diagonal = examples.autograd_diag_ggn_exact(X, y, model, lossfunc)
    torch.testing.assert_close(diagonal, ggn.diagonal())
    some = examples.autograd_diag_ggn_exact(X, y, model, lossfunc, idx=[3, 0, -1])
    torch.testing.assert_close(some, ggn.diagonal()[[3, 0, -1]])
    assert examples.autograd_diag_ggn_exact(X, y, model, lossfunc, idx=[]).shape == (0,)
    for position, column in examples._autograd_ggn_exact_columns(X, y, model, lossfunc):
        torch.testing.assert_close(column, ggn[:, position])


def test_mnist_needs_torchvision(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchvision", None)
    for load in (examples.load_one_batch_mnist, examples.get_mnist_dataloader):
        with pytest.raises(ImportError, match="pip install torchvision"):
            load()


def test_mnist(monkeypatch):
    torchvision, datasets, transforms = map(
        ModuleType, ("torchvision", "torchvision.datasets", "torchvision.transforms")
    )
    images = [(torch.full((1, 28, 28), float(label)), label) for label in range(10)]
    datasets.MNIST = lambda root, train, download, transform: images
    transforms.Compose = transforms.Normalize = lambda *args: None
    transforms.ToTensor = lambda: None
    for module in (torchvision, datasets, transforms):
        monkeypatch.setitem(sys.modules, module.__name__, module)

    X, y = next(iter(examples.get_mnist_dataloader(batch_size=4, shuffle=False)))
    assert X.shape == (4, 1, 28, 28) and y.tolist() == [0, 1, 2, 3]
    X, y = examples.load_one_batch_mnist(batch_size=3)
    assert X.shape == (3, 784) and torch.equal(X[:, 0], y.float())
    assert examples.load_one_batch_mnist(batch_size=3, flat=False)[0].shape == (3, 1, 28, 28)
