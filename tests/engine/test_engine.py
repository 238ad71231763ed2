"""The ``with`` block: what users may do around a backward pass."""

from __future__ import annotations

import copy
import io
import pickle
import threading
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from backpack import backpack, disable, extend, extensions, unextend
from backpack.extensions import (
    KFAC,
    KFLR,
    BatchDiagGGNExact,
    BatchGrad,
    BatchL2Grad,
    DiagGGNExact,
    DiagGGNMC,
    DiagHessian,
    SqrtGGNExact,
    SqrtGGNMC,
    SumGradSquared,
    Variance,
)
from tests.cases import Apply, P

N = 5


@pytest.fixture(autouse=True)
def _double() -> None:
    torch.manual_seed(0)


def network() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3)).double()


@pytest.fixture
def problem() -> tuple[nn.Sequential, nn.Module, Tensor, Tensor]:
    return (
        extend(network()),
        extend(nn.CrossEntropyLoss()),
        torch.randn(N, 4).double(),
        torch.randint(3, (N,)),
    )


def individual(model: nn.Module, X: Tensor, y: Tensor) -> list[Tensor]:
    """Individual gradients by a loop over samples, scaled by 1/N."""
    rows = []
    with disable():
        for n in range(len(X)):
            loss = F.cross_entropy(model(X[n : n + 1]), y[n : n + 1]) / len(X)
            rows.append(torch.autograd.grad(loss, list(model.parameters())))
    return [torch.stack(column) for column in zip(*rows, strict=True)]


def close(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-14)


def test_fields_and_shapes(problem) -> None:
    model, lossfunc, X, y = problem
    quantities = [
        *(BatchGrad(), BatchL2Grad(), SumGradSquared(), Variance(), DiagGGNExact(), DiagGGNMC()),
        *(BatchDiagGGNExact(), SqrtGGNExact(), SqrtGGNMC(mc_samples=4), KFAC(), KFLR(), DiagHessian()),
    ]
    with backpack(*quantities):
        lossfunc(model(X), y).backward()
    for p, g in zip(model.parameters(), individual(model, X, y), strict=True):
        close(p.grad_batch, g)
        close(p.batch_l2, g.flatten(1).pow(2).sum(1))
        close(p.variance, g.var(0, unbiased=False))
        assert p.sqrt_ggn_exact.shape == (3, N, *p.shape)
        assert p.sqrt_ggn_mc.shape == (4, N, *p.shape)
        assert [len(f) for f in p.kflr] == ([p.shape[0], p.shape[1]] if p.dim() == 2 else [len(p)])
        assert [f.shape for f in p.kfac] == [f.shape for f in p.kflr]
        close(p.diag_h, p.diag_ggn_exact)
        for ext in quantities:
            value = getattr(p, ext.savefield)
            assert not (value[0] if isinstance(value, list) else value).requires_grad


@pytest.mark.parametrize("subsampling", [[0], [3, 1, 1], [-1, 0], [], [2, -5]])
def test_subsampling(problem, subsampling: list[int]) -> None:
    model, lossfunc, X, y = problem
    with backpack(BatchGrad(), SqrtGGNExact()):
        lossfunc(model(X), y).backward()
    full = [(p.grad_batch, p.sqrt_ggn_exact) for p in model.parameters()]
    with backpack(BatchGrad(subsampling), SqrtGGNExact(subsampling=subsampling)):
        lossfunc(model(X), y).backward()
    for p, (grads, root) in zip(model.parameters(), full, strict=True):
        close(p.grad_batch, grads[subsampling])
        close(p.sqrt_ggn_exact, root[:, subsampling])


def test_subsampling_out_of_range(problem) -> None:
    model, lossfunc, X, y = problem
    with pytest.raises(IndexError, match="5 samples"), backpack(BatchGrad([7])):
        lossfunc(model(X), y).backward()


def test_nothing_outside_the_block(problem) -> None:
    model, lossfunc, X, y = problem
    lossfunc(model(X), y).backward()
    with backpack():
        lossfunc(model(X), y).backward()
    assert all(p.grad is not None and not hasattr(p, "grad_batch") for p in model.parameters())


def test_forward_inside_block_and_reusable_instances(problem) -> None:
    model, lossfunc, X, y = problem
    ext = BatchGrad()
    for _ in range(2):
        model.zero_grad()
        with backpack(ext):
            lossfunc(model(X), y).backward()
        for p in model.parameters():
            close(p.grad_batch.sum(0), p.grad)


def test_nested_blocks_replace_and_restore(problem) -> None:
    model, lossfunc, X, y = problem
    with backpack(BatchGrad()):
        with backpack(Variance()):
            lossfunc(model(X), y).backward()
        assert not hasattr(model[0].weight, "grad_batch")
        lossfunc(model(X), y).backward()
    assert hasattr(model[0].weight, "grad_batch")


def test_several_backwards_through_one_graph(problem) -> None:
    model, lossfunc, X, y = problem
    loss = lossfunc(model(X), y)
    with backpack(BatchGrad(), DiagGGNExact()):
        loss.backward(retain_graph=True)
    first = [(p.grad_batch, p.diag_ggn_exact) for p in model.parameters()]
    with backpack(BatchGrad(), DiagGGNExact()):
        loss.backward()
    for p, (g, d) in zip(model.parameters(), first, strict=True):
        close(p.grad_batch, g)
        close(p.diag_ggn_exact, d)
    with pytest.raises(RuntimeError, match="already backpropagated"), backpack(BatchGrad()):
        loss.backward()


def test_two_forwards_before_one_backward(problem) -> None:
    model, lossfunc, X, y = problem
    first, _ = lossfunc(model(X), y), lossfunc(model(X.flip(0) + 1), y)
    with backpack(BatchGrad()):
        first.backward()
    for p, g in zip(model.parameters(), individual(model, X, y), strict=True):
        close(p.grad_batch, g)


def test_several_losses_add_up(problem) -> None:
    model, lossfunc, X, y = problem
    other = extend(nn.MSELoss())
    target = torch.randn(N, 3).double()

    def run(parts) -> list[list[Tensor]]:
        f = model(X)
        losses = [lossfunc(f, y), other(f, target)]
        with backpack(BatchGrad(), DiagGGNExact(), DiagHessian()):
            sum(losses[i] for i in parts).backward()
        return [[p.grad_batch, p.diag_ggn_exact, p.diag_h] for p in model.parameters()]

    for both, a, b in zip(run([0, 1]), run([0]), run([1]), strict=True):
        for x, u, v in zip(both, a, b, strict=True):
            close(x, u + v)


def test_losses_of_one_backward_call(problem) -> None:
    """torch.autograd.backward on a list: roots are not seen beforehand."""
    model, lossfunc, X, y = problem
    with backpack(BatchGrad(), Variance(), DiagGGNExact()):
        torch.autograd.backward([lossfunc(model(X), y)])
    for p, g in zip(model.parameters(), individual(model, X, y), strict=True):
        close(p.grad_batch, g)
        close(p.variance, g.var(0, unbiased=False))


def test_incoming_gradient_scales(problem) -> None:
    model, lossfunc, X, y = problem
    exts = (BatchGrad(), BatchL2Grad(), DiagGGNExact(), SqrtGGNExact(), DiagHessian(), KFLR())
    values = []
    for factor in (1, 3):
        with backpack(*exts):
            (factor * lossfunc(model(X), y)).backward()
        values.append([[getattr(p, e.savefield) for e in exts] for p in model.parameters()])
    for one, three in zip(*values, strict=True):
        for a, b, scale in zip(one, three, (3, 9, 3, 3**0.5, 3), strict=False):
            close(scale * a, b)
        close(3 * one[-1][0], three[-1][0])


def test_sample_weights_by_unreduced_loss(problem) -> None:
    model, _, X, y = problem
    lossfunc = extend(nn.CrossEntropyLoss(reduction="none"))
    weights = torch.rand(N).double()
    with backpack(BatchGrad(), DiagGGNExact(), BatchDiagGGNExact()):
        (lossfunc(model(X), y) * weights).sum().backward()
    weighted = [(p.grad_batch, p.diag_ggn_exact_batch) for p in model.parameters()]
    with backpack(BatchGrad(), BatchDiagGGNExact()):
        lossfunc(model(X), y).backward(torch.ones(N).double())
    for p, (g, d) in zip(model.parameters(), weighted, strict=True):
        w = weights.reshape(-1, *[1] * p.dim())
        close(g, w * p.grad_batch)
        close(d, w * p.diag_ggn_exact_batch)


def test_negative_loss_has_no_square_root(problem) -> None:
    model, lossfunc, X, y = problem
    with pytest.raises(ValueError, match="negative"), backpack(SqrtGGNExact()):
        (-lossfunc(model(X), y)).backward()
    with backpack(BatchGrad(), DiagHessian()):
        (-lossfunc(model(X), y)).backward()
    assert bool((model[2].bias.diag_h < 0).all())


def test_gradient_accumulation(problem) -> None:
    model, lossfunc, X, y = problem
    for _ in range(2):
        with backpack(BatchGrad(), Variance()):
            (lossfunc(model(X), y) / 2).backward()
    for p, g in zip(model.parameters(), individual(model, X, y), strict=True):
        close(p.grad, g.sum(0))
        close(p.grad_batch, g / 2)
        close(p.variance, (g / 2).var(0, unbiased=False))


def test_backward_inputs(problem) -> None:
    model, lossfunc, X, y = problem
    with backpack(BatchGrad(), DiagGGNExact()):
        lossfunc(model(X), y).backward(inputs=[model[2].weight])
    assert hasattr(model[2].weight, "grad_batch") and hasattr(model[2].weight, "diag_ggn_exact")
    others = [p for p in model.parameters() if p is not model[2].weight]
    assert not any(hasattr(p, "grad_batch") or hasattr(p, "diag_ggn_exact") for p in others)


def test_autograd_grad(problem) -> None:
    model, lossfunc, X, y = problem
    with backpack(BatchGrad(), Variance(), DiagGGNExact()):
        torch.autograd.grad(lossfunc(model(X), y), list(model.parameters()))
    for p, g in zip(model.parameters(), individual(model, X, y), strict=True):
        assert p.grad is None
        close(p.grad_batch, g)
        close(p.variance, g.var(0, unbiased=False))
        del p.grad_batch
    with backpack(BatchGrad()):
        torch.autograd.grad(lossfunc(model(X), y), model[0].bias)
    assert hasattr(model[0].bias, "grad_batch") and not hasattr(model[2].bias, "grad_batch")


def test_hessian_product_inside_the_block(problem) -> None:
    model, lossfunc, X, y = problem
    with backpack(BatchGrad(), DiagGGNExact()):
        loss, parameters = lossfunc(model(X), y), list(model.parameters())
        with disable():
            grads = torch.autograd.grad(loss, parameters, create_graph=True)
        torch.autograd.grad(grads, parameters, grads)
    assert not hasattr(model[0].weight, "grad_batch")


def test_create_graph_makes_quantities_differentiable(problem) -> None:
    model, lossfunc, X, y = problem
    weight = model[2].weight
    with backpack(Variance(), DiagGGNExact(), BatchL2Grad()):
        lossfunc(model(X), y).backward(create_graph=True)
    found = [
        torch.autograd.grad(value.sum(), weight, retain_graph=True)[0]
        for value in (model[0].weight.variance, weight.diag_ggn_exact, weight.batch_l2)
    ]

    def values() -> list[Tensor]:
        with backpack(Variance(), DiagGGNExact(), BatchL2Grad()):
            lossfunc(model(X), y).backward()
        fields = (model[0].weight.variance, weight.diag_ggn_exact, weight.batch_l2)
        return [v.sum() for v in fields]

    step, at = 1e-6, (1, 2)
    differences = []
    for sign in (1, -1):
        with torch.no_grad():
            weight[at] += sign * step
        differences.append(values())
        with torch.no_grad():
            weight[at] -= sign * step
    for derivative, up, down in zip(found, *differences, strict=True):
        torch.testing.assert_close(derivative[at], (up - down) / (2 * step), rtol=1e-5, atol=1e-9)
    model.zero_grad()


def test_extension_hook_order_and_compaction(problem) -> None:
    model, lossfunc, X, y = problem
    seen = []

    def hook(module: nn.Module) -> None:
        seen.append(module)
        for p in module.parameters(recurse=False):
            p.norms = p.grad_batch.flatten(1).norm(dim=1)
            del p.grad_batch

    with backpack(BatchGrad(), extension_hook=hook):
        lossfunc(model(X), y).backward()
    assert seen == [lossfunc, model[2], model[0]]
    for p, g in zip(model.parameters(), individual(model, X, y), strict=True):
        close(p.norms, g.flatten(1).norm(dim=1))
        assert not hasattr(p, "grad_batch")


def test_hook_frees_one_module_at_a_time() -> None:
    """Peak memory holds one module's individual gradients, not the network's."""
    model = extend(nn.Sequential(*(nn.Linear(8, 8) for _ in range(6))))
    alive: set[int] = set()
    most = 0

    def hook(module: nn.Module) -> None:
        nonlocal most
        alive.update(id(p) for p in model.parameters() if hasattr(p, "grad_batch"))
        most = max(most, sum(hasattr(p, "grad_batch") for p in model.parameters()))
        for p in module.parameters(recurse=False):
            del p.grad_batch

    with backpack(BatchGrad(), extension_hook=hook):
        model(torch.randn(3, 8)).sum().backward()
    assert len(alive) == 12 and most == 2


def test_hook_without_extensions(problem) -> None:
    model, lossfunc, X, y = problem
    seen: list[nn.Module] = []
    with backpack(extension_hook=seen.append):
        lossfunc(model(X), y).backward()
    assert seen == [lossfunc, model[2], model[0]]


def test_hook_of_shared_parameter() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 3)).double()
    model[2].weight = model[0].weight
    extend(model)
    seen: list[nn.Module] = []
    with backpack(BatchGrad(), extension_hook=seen.append):
        model(torch.randn(2, 3).double()).sum().backward()
    assert {id(m) for m in seen} == {id(model[0]), id(model[2])} and len(seen) == 2


def test_classes_instead_of_instances() -> None:
    with pytest.raises(ValueError, match=r"BatchGrad\(\)"):
        backpack(BatchGrad)
    with pytest.raises(ValueError, match="expects instances"):
        backpack("grad_batch")
    with pytest.raises(ValueError, match=r"unpack it, backpack\(\*extensions\)"):
        backpack([BatchGrad(), DiagGGNMC()])
    with pytest.raises(TypeError, match="instantiate"):
        extend(nn.Linear)
    with pytest.raises(ValueError, match="chunk_size"):
        backpack(chunk_size=0)
    with pytest.raises(ValueError, match="mc_samples"):
        DiagGGNMC(mc_samples=0)


def test_two_extensions_with_one_field(problem) -> None:
    model, lossfunc, X, y = problem
    with pytest.warns(UserWarning, match="grad_batch"):
        context = backpack(BatchGrad(), BatchGrad([0]))
    with context:
        lossfunc(model(X), y).backward()
    assert len(model[0].weight.grad_batch) == 1


@pytest.mark.parametrize("chunk_size", [1, 2, 100])
def test_chunks(problem, chunk_size: int) -> None:
    model, lossfunc, X, y = problem
    exts = (DiagGGNExact(), SqrtGGNExact(), KFLR())
    values = []
    for size in (None, chunk_size):
        with backpack(*exts, chunk_size=size):
            lossfunc(model(X), y).backward()
        values.append([(p.diag_ggn_exact, p.sqrt_ggn_exact, p.kflr) for p in model.parameters()])
    for (d, s, k), (d2, s2, k2) in zip(*values, strict=True):
        close(d, d2)
        close(s, s2)
        for a, b in zip(k, k2, strict=True):
            close(a, b)


def test_reproducible_sampling(problem) -> None:
    model, lossfunc, X, y = problem

    def draw(seed: int | None, generator: torch.Generator | None = None) -> Tensor:
        if seed is not None:
            torch.manual_seed(seed)
        with backpack(DiagGGNMC(mc_samples=2, generator=generator)):
            lossfunc(model(X), y).backward()
        return model[0].weight.diag_ggn_mc

    close(draw(1), draw(1))
    assert not torch.equal(draw(1), draw(2))
    close(draw(None, torch.Generator().manual_seed(3)), draw(None, torch.Generator().manual_seed(3)))


@pytest.mark.parametrize("lossfunc", [nn.CrossEntropyLoss, nn.MSELoss, nn.BCEWithLogitsLoss])
def test_sampling_is_unbiased(lossfunc) -> None:
    model, X = extend(network()), torch.randn(N, 4).double()
    loss = extend(lossfunc())
    y = torch.randint(3, (N,)) if lossfunc is nn.CrossEntropyLoss else torch.rand(N, 3).double()
    with backpack(DiagGGNExact(), DiagGGNMC(mc_samples=4000), KFLR(), KFAC(mc_samples=4000)):
        loss(model(X), y).backward()
    for p in model.parameters():
        scale = float(p.diag_ggn_exact.max())
        torch.testing.assert_close(p.diag_ggn_mc, p.diag_ggn_exact, rtol=0.15, atol=0.03 * scale)
        scale = float(p.kflr[0].abs().max())
        torch.testing.assert_close(p.kfac[0], p.kflr[0], rtol=0.15, atol=0.03 * scale)


def test_disable(problem) -> None:
    model, lossfunc, X, y = problem
    assert disable.should_store_io()
    with disable():
        assert not disable.should_store_io()
        loss = lossfunc(model(X), y)
    with pytest.warns(UserWarning, match="extend"), backpack(DiagGGNExact()):
        loss.backward()
    assert not hasattr(model[0].weight, "diag_ggn_exact")
    loss = lossfunc(model(X), y)
    with backpack(BatchGrad()), disable():
        loss.backward()
    assert not hasattr(model[0].weight, "grad_batch")


def test_extend_twice_unextend_copy_and_save(problem) -> None:
    model, lossfunc, X, y = problem
    keys = list(model.state_dict())
    extend(model)
    assert keys == list(network().state_dict())
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    copies = [
        copy.deepcopy(model),
        pickle.loads(pickle.dumps(model)),
        torch.load(buffer, weights_only=False),
    ]
    for twin in (model, *copies):
        calls: list[nn.Module] = []
        with backpack(BatchGrad(), extension_hook=calls.append):
            lossfunc(twin(X), y).backward()
        assert len(calls) == 3
        close(twin[0].weight.grad_batch.sum(0), twin[0].weight.grad)
    loss = lossfunc(model(X), y)
    copy.deepcopy(model)  # between forward and backward
    loss.backward()
    unextend(model)
    assert not model._forward_hooks and not model._forward_pre_hooks
    del model[0].weight.grad_batch
    with pytest.warns(UserWarning, match="extend"), backpack(BatchGrad()):
        F.cross_entropy(model(X), y).backward()
    assert not hasattr(model[0].weight, "grad_batch")
    extend(model)
    with backpack(BatchGrad()):
        lossfunc(model(X), y).backward()
    assert hasattr(model[0].weight, "grad_batch")


def test_use_converter_is_accepted(problem) -> None:
    _, lossfunc, X, y = problem
    model = extend(network(), use_converter=True)
    with backpack(DiagGGNExact()):
        lossfunc(model(X), y).backward()
    assert hasattr(model[0].weight, "diag_ggn_exact")


def test_functional_losses(problem) -> None:
    model, lossfunc, X, y = problem
    exts = (BatchGrad(), DiagGGNExact(), SqrtGGNExact(), DiagHessian())
    with backpack(*exts):
        lossfunc(model(X), y).backward()
    reference = [(p.grad_batch, p.diag_ggn_exact, p.diag_h) for p in model.parameters()]

    class Inside(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = model

        def forward(self, X: Tensor, labels: Tensor) -> Tensor:
            return F.cross_entropy(self.net(X), labels)

    inside = extend(Inside())

    def outside() -> Tensor:
        return F.cross_entropy(model(X), y)

    def written_out() -> Tensor:
        return -model(X).log_softmax(1)[torch.arange(N), y].mean()

    for make in (outside, written_out, lambda: inside(X, y)):
        with backpack(*exts):
            make().backward()
        for p, (g, d, h) in zip(model.parameters(), reference, strict=True):
            close(p.grad_batch, g)
            torch.testing.assert_close(p.diag_ggn_exact, d, rtol=1e-8, atol=1e-12)
            close(p.diag_h, h)
    loss = outside()
    with backpack(DiagGGNMC(mc_samples=3)):
        loss.backward()
    assert model[0].weight.diag_ggn_mc.shape == (6, 4)


def test_weight_decay_in_the_loss(problem) -> None:
    model, lossfunc, X, y = problem
    with backpack(BatchGrad(), Variance(), DiagGGNExact()):
        penalty = sum(p.pow(2).sum() for p in model.parameters())
        (lossfunc(model(X), y) + 0.1 * penalty).backward()
    for p, g in zip(model.parameters(), individual(model, X, y), strict=True):
        close(p.grad_batch, g)
        close(p.variance, g.var(0, unbiased=False))


def test_users_tensor_hooks_do_not_change_quantities(problem) -> None:
    model, lossfunc, X, y = problem
    handles = [p.register_hook(lambda g: g * 100) for p in model.parameters()]
    with backpack(BatchGrad(), Variance()):
        lossfunc(model(X), y).backward()
    for handle in handles:
        handle.remove()
    for p, g in zip(model.parameters(), individual(model, X, y), strict=True):
        close(p.grad, 100 * g.sum(0))
        close(p.variance, g.var(0, unbiased=False))


def test_frozen_parameters_get_nothing(problem) -> None:
    model, lossfunc, X, y = problem
    model[0].weight.requires_grad_(False)
    with backpack(BatchGrad(), DiagGGNExact()):
        lossfunc(model(X), y).backward()
    assert not hasattr(model[0].weight, "grad_batch")
    assert hasattr(model[0].bias, "grad_batch") and hasattr(model[2].weight, "diag_ggn_exact")


def test_other_threads_are_left_alone(problem) -> None:
    model, lossfunc, X, y = problem
    other = extend(network())

    def work() -> None:
        lossfunc(other(X), y).backward()

    with backpack(BatchGrad()):
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
        lossfunc(model(X), y).backward()
    assert other[0].weight.grad is not None and not hasattr(other[0].weight, "grad_batch")
    assert hasattr(model[0].weight, "grad_batch")


def test_two_threads_each_with_a_block(problem) -> None:
    _, lossfunc, X, y = problem
    models = [extend(network()) for _ in range(4)]
    errors: list[BaseException] = []

    def work(model: nn.Module) -> None:
        try:
            for _ in range(20):
                model.zero_grad()
                with backpack(BatchGrad(), DiagGGNExact()):
                    lossfunc(model(X), y).backward()
                for p in model.parameters():
                    close(p.grad_batch.sum(0), p.grad)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(m,)) for m in models]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors


def test_modules_called_one_by_one(problem) -> None:
    """Children of an extended model called on their own."""
    model, lossfunc, X, y = problem
    out = X
    for layer in model:
        out = layer(out)
    with backpack(BatchGrad(), DiagGGNExact()):
        lossfunc(out, y).backward()
    for p, g in zip(model.parameters(), individual(model, X, y), strict=True):
        close(p.grad_batch, g)
        assert p.diag_ggn_exact.shape == p.shape


def test_extended_parts_of_a_larger_model(problem) -> None:
    """Fields appear for the extended part, below layers that are not extended, and for these."""
    _, lossfunc, X, y = problem
    body, head = extend(network()), nn.Linear(3, 3).double()
    with backpack(BatchGrad(), DiagGGNExact()):
        lossfunc(head(body(X).tanh()), y).backward()
    close(body[0].weight.grad_batch.sum(0), body[0].weight.grad)
    close(head.weight.grad_batch.sum(0), head.weight.grad)


def test_siamese_use(problem) -> None:
    model, _, X, _ = problem
    lossfunc = extend(nn.MSELoss())
    Z = torch.randn_like(X)
    with backpack(BatchGrad(), BatchL2Grad()):
        lossfunc(model(X) - model(Z), torch.zeros(N, 3).double()).backward()
    for n in range(N):
        with disable():
            difference = model(X[n : n + 1]) - model(Z[n : n + 1])
            loss = difference.pow(2).sum() / (3 * N)
            grads = torch.autograd.grad(loss, list(model.parameters()))
        for p, g in zip(model.parameters(), grads, strict=True):
            close(p.grad_batch[n], g)
            close(p.batch_l2[n], g.pow(2).sum())


def test_extra_axes_and_ignored_labels() -> None:
    torch.manual_seed(0)
    model = extend(nn.Conv1d(2, 3, 2).double())
    X, y = torch.randn(4, 2, 5).double(), torch.randint(3, (4, 4))
    y[0, 1] = y[2] = -100
    lossfunc = extend(nn.CrossEntropyLoss(weight=torch.rand(3).double(), label_smoothing=0.1))
    from backpack import check

    report = check(model, lossfunc, X, y)
    assert report.ok, str(report)


def test_debug_prints(problem, capsys) -> None:
    model, lossfunc, X, y = problem
    extend(network(), debug=True)
    with backpack(BatchGrad(), debug=True):
        lossfunc(model(X), y).backward()
    text = capsys.readouterr().out
    assert "[DEBUG] Extending" in text and "tap linear: '2.weight', '2.bias'" in text
    assert "by its rule" in text and "[DEBUG] quantities of '2.weight': " in text


def test_input_and_output_of_other_layers() -> None:
    model = extend(nn.Sequential(nn.Embedding(5, 4), nn.LayerNorm(4), nn.Flatten(), nn.Linear(12, 3)))
    index, seen = torch.randint(5, (N, 3)), {}

    def hook(module: nn.Module) -> None:
        if hasattr(module, "input0") and not isinstance(module, nn.CrossEntropyLoss):
            seen[module] = module.input0, module.output

    with backpack(BatchGrad(), extension_hook=hook):
        extend(nn.CrossEntropyLoss())(model(index), torch.randint(3, (N,))).backward()
    assert torch.equal(seen[model[0]][0], index)
    for module, (given, output) in seen.items():
        torch.testing.assert_close(module(given), output)
    assert set(seen) == {model[0], model[1], model[3]}
    assert not hasattr(model[1], "output")


def test_layer_that_its_rule_does_not_cover() -> None:
    from backpack import check

    model = Apply(lambda m, a: F.linear(a, m.w).unsqueeze(1).sin(), w=P(4))
    extend(model)
    with backpack(BatchGrad()):
        extend(nn.MSELoss())(model(torch.randn(5, 4)), torch.randn(5, 1)).backward()
    assert model.w.grad_batch.shape == (5, 4)
    report = check(model, nn.MSELoss(), torch.randn(5, 4), torch.randn(5, 1))
    assert report.ok, str(report)


def test_debug_names_the_fallback(capsys) -> None:
    model = extend(Apply(lambda m, a: F.bilinear(a, a, m.w), w=P(3, 4, 4)))
    with backpack(DiagGGNExact(), debug=True):
        extend(nn.MSELoss())(model(torch.randn(5, 4)), torch.randn(5, 3)).backward()
    text = capsys.readouterr().out
    assert "tap bilinear: 'w' (samples 5, axis 0), sample by sample" in text
    assert "[DEBUG] columns carried to all taps: " in text


def test_input_and_output_in_a_hook(problem) -> None:
    """As the original has them, without keeping them: outputs are computed when they are asked for."""
    model, lossfunc, X, y = problem
    seen = {}

    def hook(module: nn.Module) -> None:
        if isinstance(module, nn.Linear):
            seen[module] = module.input0, module.output
            assert "output" not in module.state_dict()

    with backpack(BatchGrad(), extension_hook=hook):
        lossfunc(model(X), y).backward()
    layers = [module for module in model if isinstance(module, nn.Linear)]
    assert len(seen) == len(layers)
    for module in layers:
        torch.testing.assert_close(module(seen[module][0]), seen[module][1])
        assert not hasattr(module, "input0") and not hasattr(module, "output")
    torch.testing.assert_close(seen[layers[0]][0], X)


@pytest.mark.parametrize("kept", [True, False], ids=["kept", "gone"])
@pytest.mark.parametrize("gradient", [True, False], ids=["gradient", "alone"])
@pytest.mark.parametrize(
    "loss, target",
    [
        (nn.CrossEntropyLoss(label_smoothing=0.1), torch.randint(3, (N,))),
        (nn.CrossEntropyLoss(weight=torch.rand(3), reduction="sum"), torch.rand(N, 3)),
        (nn.MSELoss(), torch.randn(N, 3)),
        (nn.L1Loss(), torch.randn(N, 3)),
        (nn.BCEWithLogitsLoss(pos_weight=torch.rand(3)), torch.rand(N, 3)),
    ],
    ids=["ce", "ce-soft", "mse", "l1", "bce"],
)
def test_a_loss_has_its_inputs_in_a_hook(
    loss: nn.Module, target: Tensor, gradient: bool, kept: bool
) -> None:
    model, X, seen = extend(nn.Linear(4, 3)), torch.randn(N, 4), {}

    def hook(module: nn.Module) -> None:
        seen[type(module)] = module.input0, getattr(module, "input1", None), module.output

    lossfunc = extend(loss)
    output = model(X)
    expected = output.detach().clone()
    value = lossfunc(output, target=target) if gradient else lossfunc(output, target)
    if not kept:
        del output
    with backpack(BatchGrad(), extension_hook=hook, gradient=gradient):
        value.backward()
    f, y, again = seen[type(loss)]
    # The logits themselves, or what stands for them in a cross-entropy.
    known = expected if kept or not isinstance(loss, nn.CrossEntropyLoss) else expected.log_softmax(1)
    torch.testing.assert_close(f, known)
    assert y is target
    torch.testing.assert_close(again, value.detach())
    assert not any(hasattr(loss, name) for name in ("input0", "input1", "output"))


def test_no_warnings(problem) -> None:
    model, lossfunc, X, y = problem
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with backpack(*(getattr(extensions, n)() for n in ("BatchGrad", "KFAC", "DiagGGNExact"))):
            lossfunc(model(X), y).backward()


def test_chosen_parameters() -> None:
    """Quantities of some parameters only, in a whole pass, of some inputs, and without the gradient."""
    model, lossfunc = extend(nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))), extend(nn.MSELoss())
    x, chosen = torch.rand(5, 3), [model[0].weight, model[1].bias]
    for options in ({}, {"inputs": [model[0].weight, model[1].weight]}):
        for gradient in (True, False):
            loss = lossfunc(model(x), torch.zeros(5, 2))
            with backpack(BatchGrad(), parameters=chosen, gradient=gradient):
                loss.backward(**options)
            found = [p for p in model.parameters() if hasattr(p, "grad_batch")]
            assert [id(p) for p in found] == [id(p) for p in (chosen[:1] if options else chosen)]
            for p in found:
                del p.grad_batch
            model.zero_grad()


def test_beside_an_open_block() -> None:
    """Another's quantities and the user's, in one pass."""
    model, lossfunc = extend(nn.Linear(3, 2)), extend(nn.MSELoss())
    with backpack(BatchGrad(), gradient=False):
        loss = lossfunc(model(torch.rand(5, 3)), torch.zeros(5, 2))
        with backpack.beside(BatchL2Grad(), parameters=[model.bias]):
            loss.backward()
    for p in model.parameters():
        assert p.grad is None
        torch.testing.assert_close(p.batch_l2, p.grad_batch.flatten(1).square().sum(1))
    block = backpack.beside(BatchL2Grad(), parameters=[model.bias])
    assert block.extensions and block.parameters == {model.bias}
