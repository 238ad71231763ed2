"""Time of individual gradients of a residual (Poisson's equation), beside a loop and torch.func.

    python -m benchmarks.derivatives [width] [samples]

Minima of several runs on one thread, and their ratios to one backward pass without quantities.
"""

from __future__ import annotations

import copy
import sys
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

from backpack import backpack, extend
from backpack.extensions import BatchGrad, BatchL2Grad, DiagGGNExact

REPEATS = 5


def main(width: int = 64, samples: int = 256) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    sizes = [2, width, width, width]
    layers = [
        each for i, o in zip(sizes, sizes[1:], strict=False) for each in (nn.Linear(i, o), nn.Tanh())
    ]
    plain = nn.Sequential(*layers, nn.Linear(width, 1))
    model = extend(copy.deepcopy(plain))
    X = torch.rand(samples, 2)

    def share(net: nn.Module, X: Tensor) -> Tensor:
        X = X.clone().requires_grad_()
        (du,) = torch.autograd.grad(net(X).sum(), X, create_graph=True)
        second = [torch.autograd.grad(du[:, i].sum(), X, create_graph=True)[0][:, i] for i in range(2)]
        return (second[0] + second[1] + 1).square()

    def loop() -> None:
        parameters = list(plain.parameters())
        for x in X.split(1):
            torch.autograd.grad(share(plain, x).sum(), parameters, allow_unused=True)

    def functional() -> None:
        parameters = {name: p.detach() for name, p in plain.named_parameters()}

        def loss(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
            def u(x: Tensor) -> Tensor:
                return torch.func.functional_call(plain, parameters, (x,)).squeeze()

            return (torch.func.hessian(u)(x).diagonal().sum() + 1).square()

        torch.func.vmap(torch.func.grad(loss), (None, 0))(parameters, X)

    def computing(*exts: BatchGrad) -> Callable[[], None]:
        def run() -> None:
            with backpack(*exts):
                share(model, X).mean().backward()

        return run

    cases = {
        "one backward pass": lambda: share(plain, X).mean().backward(),
        "loop over samples": loop,
        "torch.func": functional,
        "BatchGrad": computing(BatchGrad()),
        "BatchL2Grad": computing(BatchL2Grad()),
        "DiagGGNExact": computing(DiagGGNExact()),  # type: ignore[arg-type]
    }
    best = dict.fromkeys(cases, float("inf"))
    for _ in range(REPEATS + 1):  # the first finds where samples are
        for name, run in cases.items():
            begin = time.process_time()
            run()
            best[name] = min(best[name], time.process_time() - begin)
    for name, seconds in best.items():
        print(f"{name:20s} {1e3 * seconds:8.1f} ms  {seconds / best['one backward pass']:7.2f}")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
