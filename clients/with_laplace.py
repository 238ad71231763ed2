"""laplace-torch with its BackPACK backends: posteriors, marginal likelihoods, predictions."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from itertools import product
from typing import Any

import record
import torch
from laplace import Laplace, marglik_training
from laplace.curvature import BackPackEF, BackPackGGN
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

BACKENDS = {"ggn": BackPackGGN, "ef": BackPackEF}


def mlp(outputs: int) -> tuple[nn.Module, tuple[int, ...]]:
    """Three linear layers."""
    model = nn.Sequential(
        *(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, outputs))
    )
    return model, (4,)


def cnn(outputs: int) -> tuple[nn.Module, tuple[int, ...]]:
    """Two convolutions, a pooling, two linear layers."""
    model = nn.Sequential(
        *(nn.Conv2d(1, 3, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(3, 4, 3, stride=2), nn.Sigmoid(), nn.Flatten()),
        *(nn.Linear(16, 5), nn.ReLU(), nn.Linear(5, outputs)),
    )
    return model, (1, 11, 11)


MODELS = {"mlp": mlp, "cnn": cnn}


def problem(likelihood: str, model: str) -> tuple[nn.Module, DataLoader, Tensor]:
    """A model, two batches of data, and inputs to predict at."""
    outputs = 3 if likelihood == "classification" else 2
    net, shape = MODELS[model](outputs)
    X = torch.rand(10, *shape)
    y = torch.randint(outputs, (10,)) if likelihood == "classification" else torch.rand(10, outputs)
    return net, DataLoader(TensorDataset(X, y), batch_size=6), torch.rand(4, *shape)


def curvature(la: Any) -> Any:
    """The matrix a Laplace approximation holds, in the form it holds it."""
    return la.H_facs.kfacs if getattr(la, "H_facs", None) is not None else la.H


def posterior(likelihood: str, model: str, subset: str, structure: str, backend: str) -> dict[str, Any]:
    """Fit, tune the prior, predict."""
    net, loader, X = problem(likelihood, model)
    extra = {"subnetwork_indices": torch.tensor([0, 3, 8, 12])} if subset == "subnetwork" else {}
    la = Laplace(
        net, likelihood, subset, structure, backend=BACKENDS[backend], prior_precision=2.0, **extra
    )
    la.fit(loader)
    found = {"curvature": curvature(la), "evidence": la.log_marginal_likelihood()}
    if structure != "kron":
        found["precision"] = la.posterior_precision
    mean, variance = la._glm_predictive_distribution(X)
    found |= {"mean": mean, "variance": variance, "prediction": la(X)}
    la.optimize_prior_precision(n_steps=5)
    found |= {"prior": la.prior_precision, "tuned": la.log_marginal_likelihood()}
    return found


def refit(likelihood: str, model: str, structure: str, backend: str) -> dict[str, Any]:
    """Fit, predict, and fit again: the library's hooks were taken off in between.

    Raises:
        ValueError: if the second fit gives other numbers than the first.
    """
    net, loader, X = problem(likelihood, model)
    la = Laplace(net, likelihood, "all", structure, backend=BACKENDS[backend])
    la.fit(loader)
    once = record.plain(curvature(la))
    la(X)
    la.fit(loader)
    if record.plain(curvature(la)) != once:
        raise ValueError("the second fit gives other numbers than the first")
    return {"curvature": once}


def gaussian_process(likelihood: str, model: str) -> dict[str, Any]:
    """The function-space view, which needs Jacobians only."""
    net, loader, X = problem(likelihood, model)
    la = Laplace(net, likelihood, "all", "gp", backend=BackPackGGN, n_subset=8, seed=0)
    la.fit(loader)
    mean, variance = la._glm_predictive_distribution(X)
    return {"mean": mean, "variance": variance}


def functional(likelihood: str, kind: str) -> dict[str, Any]:
    """Nystrom and variational approximations in function space."""
    net, loader, X = problem(likelihood, "mlp")
    extra: dict[str, dict[str, Any]] = {
        "nystrom": {"subsample_size": 8, "n_eigenvalues": 4},
        "variational": {"inducing_locations": X},
    }
    la = Laplace(
        *(net, likelihood, "all", "gp"),
        functional_approximation=kind,
        backend=BackPackGGN,
        **extra[kind],
    )
    la.fit(loader)
    mean, variance = la._glm_predictive_distribution(X)
    return {"mean": mean, "variance": variance}


def derivatives(likelihood: str, model: str) -> dict[str, Any]:
    """Jacobians, individual gradients, and gradients through Jacobians with respect to inputs."""
    net, loader, X = problem(likelihood, model)
    net.output_size = 3 if likelihood == "classification" else 2
    backend = BackPackGGN(net, likelihood)
    jacobian, f = backend.jacobians(X)
    x, y = next(iter(loader))
    found = {"jacobian": jacobian, "f": f}
    backend = BackPackGGN(problem(likelihood, model)[0], likelihood)
    found["gradients"], _ = backend.gradients(x, y)
    X.requires_grad_()
    backend.model.output_size = net.output_size
    jacobian, f = backend.jacobians(X, enable_backprop=True)
    (found["input_grad"],) = torch.autograd.grad((jacobian**2).sum() + f.sum(), X)
    backend = BackPackGGN(net, likelihood)
    found["selected"], _ = backend.selected_output_jacobians(
        X.detach(), torch.tensor([[0, 1]]).expand(4, 2)
    )
    return found


def training(likelihood: str, structure: str) -> dict[str, Any]:
    """Training on the marginal likelihood, which fits anew in every epoch."""
    net, loader, X = problem(likelihood, "mlp")
    la, net, evidences, losses = marglik_training(
        net,
        loader,
        likelihood,
        structure,
        BackPackGGN,
        n_epochs=3,
        n_hypersteps=3,
        optimizer_kwargs={"lr": 0.01},
    )
    return {"evidences": evidences, "losses": losses, "prediction": la(X)}


def cases() -> Iterator[tuple[str, Callable[[], Any]]]:
    """Names and functions."""
    likelihoods = "classification", "regression"
    for likelihood, model in product(likelihoods, MODELS):
        yield f"derivatives {likelihood} {model}", partial(derivatives, likelihood, model)
        yield f"gp {likelihood} {model}", partial(gaussian_process, likelihood, model)
        for subset, backend in product(("all", "last_layer", "subnetwork"), BACKENDS):
            for structure in ("full", "kron", "diag"):
                if structure == "kron" and (subset == "subnetwork" or backend == "ef"):
                    continue  # laplace offers neither
                arguments = likelihood, model, subset, structure, backend
                yield " ".join(arguments), partial(posterior, *arguments)
    for likelihood, kind in product(likelihoods, ("nystrom", "variational")):
        yield f"{kind} {likelihood}", partial(functional, likelihood, kind)
    for structure, backend in (("full", "ef"), ("kron", "ggn"), ("diag", "ggn"), ("diag", "ef")):
        arguments = "classification", "cnn", structure, backend
        yield f"fit again {' '.join(arguments)}", partial(refit, *arguments)
    for likelihood, structure in product(likelihoods, ("full", "kron", "diag")):
        yield f"training {likelihood} {structure}", partial(training, likelihood, structure)


if __name__ == "__main__":
    record.main(dict(cases()))
