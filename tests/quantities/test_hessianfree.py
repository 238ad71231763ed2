"""Matrix-vector products against dense Jacobians and Hessians by ``torch.func``."""

import pytest
import torch
from torch import nn
from torch.func import functional_call, jacrev

from backpack.hessianfree.ggnvp import ggn_vector_product, ggn_vector_product_from_plist
from backpack.hessianfree.hvp import hessian_vector_product
from backpack.hessianfree.lop import L_op, transposed_jacobian_vector_product
from backpack.hessianfree.rop import R_op, jacobian_vector_product

CASES = {
    "cross entropy": (
        lambda: nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)),
        nn.CrossEntropyLoss(),
        (5, 3),
        lambda: torch.randint(2, (5,)),
    ),
    "mse": (
        lambda: nn.Sequential(nn.Conv2d(1, 2, 2), nn.Sigmoid(), nn.Flatten(), nn.Linear(8, 2)),
        nn.MSELoss(reduction="sum"),
        (2, 1, 3, 3),
        lambda: random(2, 2),
    ),
}
NAMES = list(CASES)


def random(*shape):
    return torch.randn(*shape, dtype=torch.float64)


def dense_hessian(function):
    return jacrev(jacrev(function))


class Problem:
    """A small model, its loss, and dense matrices over all parameters."""

    def __init__(self, name):
        torch.manual_seed(0)
        make_model, self.lossfunc, shape, make_target = CASES[name]
        self.model = make_model().double()
        self.X, self.y = random(*shape), make_target()
        self.params = list(self.model.parameters())
        self.v = [torch.randn_like(p) for p in self.params]
        self.output = self.model(self.X)
        self.loss = self.lossfunc(self.output, self.y)

    def at(self, vector):
        """The model's output as a function of the flattened parameters."""
        names = [name for name, _ in self.model.named_parameters()]
        parts = vector.split([p.numel() for p in self.params])
        values = [part.view_as(p) for part, p in zip(parts, self.params, strict=True)]
        return functional_call(self.model, dict(zip(names, values, strict=True)), (self.X,))

    @property
    def vector(self):
        return flat(self.params).detach()

    def jacobian(self):
        return jacrev(self.at)(self.vector).flatten(end_dim=-2)

    def hessian(self):
        return dense_hessian(lambda vector: self.lossfunc(self.at(vector), self.y))(self.vector)

    def ggn(self):
        output = self.output.detach()
        loss_hessian = dense_hessian(lambda f: self.lossfunc(f, self.y))(output)
        J = self.jacobian()
        return J.T @ loss_hessian.reshape(len(J), len(J)) @ J


def flat(tensors):
    return torch.cat([tensor.flatten() for tensor in tensors])


@pytest.fixture(params=NAMES)
def problem(request):
    return Problem(request.param)


def check(result, expected, like):
    assert isinstance(result, tuple)
    assert [r.shape for r in result] == [t.shape for t in like]
    assert not any(r.requires_grad for r in result)
    torch.testing.assert_close(flat(result), expected)


@pytest.mark.parametrize("function", [R_op, jacobian_vector_product])
def test_jacobian(problem, function):
    result = function(problem.output, problem.params, problem.v)
    check(result, problem.jacobian() @ flat(problem.v), [problem.output])


@pytest.mark.parametrize("function", [L_op, transposed_jacobian_vector_product])
def test_transposed_jacobian(problem, function):
    w = torch.randn_like(problem.output)
    result = function(problem.output, problem.params, w)
    check(result, problem.jacobian().T @ w.flatten(), problem.params)


def test_hessian(problem):
    expected = problem.hessian() @ flat(problem.v)
    check(hessian_vector_product(problem.loss, problem.params, problem.v), expected, problem.params)
    grads = torch.autograd.grad(problem.loss, problem.params, create_graph=True)
    for _ in range(2):  # the graph is kept
        result = hessian_vector_product(problem.loss, problem.params, problem.v, grad_params=grads)
        check(result, expected, problem.params)


def test_ggn(problem):
    expected = problem.ggn() @ flat(problem.v)
    for _ in range(2):  # the graph is kept
        result = ggn_vector_product(problem.loss, problem.output, problem.model, problem.v)
        check(result, expected, problem.params)
    some = slice(1, 3)
    v = [x if 1 <= i < 3 else torch.zeros_like(x) for i, x in enumerate(problem.v)]
    column = [x.view_as(p) for x, p in split(problem.ggn() @ flat(v), problem.params)]
    result = ggn_vector_product_from_plist(
        problem.loss, problem.output, problem.params[some], problem.v[some]
    )
    check(result, flat(column[some]), problem.params[some])


def split(vector, tensors):
    return zip(vector.split([t.numel() for t in tensors]), tensors, strict=True)


def test_one_tensor_a_generator_and_no_grad_mode(problem):
    weight, v = problem.params[0], problem.v[0]
    (alone,) = hessian_vector_product(problem.loss, weight, v)
    (listed,) = hessian_vector_product(problem.loss, [weight], [v])
    assert torch.equal(alone, listed)
    expected = ggn_vector_product(problem.loss, problem.output, problem.model, problem.v)
    with torch.no_grad():
        result = ggn_vector_product_from_plist(
            problem.loss, problem.output, problem.model.parameters(), iter(problem.v)
        )
    check(result, flat(expected), problem.params)


def test_several_outputs():
    x, z = random(3).requires_grad_(), random(2).requires_grad_()
    ys, vs = [x**2, x.sum() * z], [random(3), random(2)]
    ws = [random(3), random(2)]
    cross = vs[0].sum() * z + x.sum() * vs[1]
    check(R_op(ys, [x, z], vs), flat([2 * x * vs[0], cross]).detach(), ys)
    expected = [2 * x * ws[0] + (z * ws[1]).sum(), x.sum() * ws[1]]
    check(L_op(ys, [x, z], ws), flat(expected).detach(), [x, z])


def test_unused_parameters_give_zeros():
    x, unused = random(3).requires_grad_(), random(2).requires_grad_()
    v = [random(3), random(2)]
    y = x**3
    zeros = torch.zeros(2, dtype=torch.float64)
    hvp = (6 * x * v[0]).detach()
    check(hessian_vector_product(y.sum(), [x, unused], v), flat([hvp, zeros]), v)
    check(L_op(y, [x, unused], v[0]), flat([(3 * x**2 * v[0]).detach(), zeros]), v)
    check(R_op([y, 2 * unused], [x], v[0]), flat([(3 * x**2 * v[0]).detach(), zeros]), v)
    loss = (y**2).sum()
    result = ggn_vector_product_from_plist(loss, y, [x, unused], v)
    check(result, flat([(18 * x**4 * v[0]).detach(), zeros]), v)


def test_linear_functions_have_zero_curvature():
    x = random(3).requires_grad_()
    zeros = torch.zeros(3, dtype=torch.float64)
    check(hessian_vector_product(x.sum(), x, random(3)), zeros, [x])
    y = 2 * x
    check(ggn_vector_product_from_plist(y.sum(), y, x, random(3)), zeros, [x])


def test_result_can_be_differentiated():
    x, v = random(3).requires_grad_(), random(3)
    y = x**3
    for result, factor in (
        (hessian_vector_product(y.sum(), x, v, detach=False), 6 * torch.ones_like(v)),
        (R_op(y, x, v, retain_graph=False, detach=False), 6 * x),
        (L_op(y, x, v, retain_graph=False, detach=False), 6 * x),
    ):
        (derivative,) = torch.autograd.grad(result[0].sum(), x, retain_graph=True)
        torch.testing.assert_close(derivative, (factor * v).detach())


@pytest.mark.parametrize("function", [R_op, L_op])
def test_graph_is_freed_on_request(function):
    x = random(3).requires_grad_()
    y = x.exp()
    for _ in range(2):
        function(y, x, random(3))
    function(y, x, random(3), retain_graph=False)
    with pytest.raises(RuntimeError, match="second time"):
        y.sum().backward()


def test_errors(problem):
    loss, output, params, v = problem.loss, problem.output, problem.params, problem.v
    for call in (
        lambda: R_op(output, params, v[:-1]),
        lambda: L_op(output, params, output[0]),
        lambda: hessian_vector_product(loss, params, v[::-1]),
        lambda: hessian_vector_product(loss, params, v, grad_params=v[:1]),
    ):
        with pytest.raises(ValueError, match="must match"):
            call()
    with pytest.raises(ValueError, match="create_graph=True"):
        hessian_vector_product(loss, params, v, grad_params=v)
    params[0].requires_grad_(False)
    with pytest.raises(ValueError, match=r"without \['0.weight'\], which are frozen"):
        ggn_vector_product(loss, output, problem.model, v)
    problem.model.requires_grad_(False)
    with pytest.raises(ValueError, match="no parameter of the model requires grad"):
        ggn_vector_product(loss, output, problem.model, [])


def test_frozen_parameters_are_constants(problem):
    """The block of the trained ones, in their order."""
    expected = [torch.zeros_like(x) for x in problem.v]
    expected[1::2] = problem.v[1::2]
    column = problem.ggn() @ flat(expected)
    column = [x for i, (x, _) in enumerate(split(column, problem.params)) if i % 2]
    for p in problem.params[::2]:
        p.requires_grad_(False)
    output = problem.model(problem.X)
    loss = problem.lossfunc(output, problem.y)
    result = ggn_vector_product(loss, output, problem.model, problem.v[1::2])
    check(result, flat(column), problem.params[1::2])
