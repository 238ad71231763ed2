"""A process that measures one library, told by lines of JSON on its input what to do.

    python -m benchmarks.worker LIBRARY [FOLDER]

The answers are lines of JSON on what was its output when it started; whatever a library prints goes to
the standard error.
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import resource
import sys
import time
import warnings
from pathlib import Path
from typing import Any, TextIO

import torch

from benchmarks import low_rank
from benchmarks.libraries import GRADIENT, LIBRARIES, SAMPLED, Library, distance
from benchmarks.problems import Setting, make

Answer = dict[str, Any]

# Seconds in which the threads of the worker measured before come to rest, and that a turn fills.
SETTLE, SPAN = 0.02, 0.02


class Worker:
    """The state between two lines: a library at work on a problem."""

    def __init__(self, library: str, device: str) -> None:
        self.name, self.device = library, device
        self.library: Library | None = None

    def hello(self) -> Answer:
        """Who answers."""
        return {"version": LIBRARIES[self.name].version(), "torch": torch.__version__}

    def open(self, state: str, setting: list, batch: int | None = None) -> Answer:
        """Build a problem's network, with the state that every worker gets."""
        self.library = None
        gc.unfreeze()
        gc.collect()
        model, X, y = make(Setting(*setting))
        values, X, y = torch.load(state)
        # In the same order, whatever a library calls the parts of its modules.
        model.load_state_dict(dict(zip(model.state_dict(), values.values(), strict=True)))
        X, y = X[:batch].to(self.device), y[:batch].to(self.device)
        self.library = LIBRARIES[self.name](model.to(self.device), X, y)
        gc.collect()
        gc.freeze()
        return {"parameters": sum(p.numel() for p in model.parameters())}

    def synchronise(self) -> None:
        """Wait for the device."""
        if self.device != "cpu":
            torch.cuda.synchronize()

    def seconds(self, quantity: str) -> float:
        """Of one forward and backward pass."""
        assert self.library is not None
        self.library.reset()
        step = self.library.step(quantity)
        self.synchronise()
        start = time.perf_counter()
        step()
        self.synchronise()
        return time.perf_counter() - start

    def check(self, quantity: str, reference: str, save: bool) -> Answer:
        """Compute once, and compare with what this library's worker saved."""
        assert self.library is not None
        torch.manual_seed(1)
        self.seconds(quantity)
        found: Answer = {}
        if quantity not in (GRADIENT, *SAMPLED, *low_rank.SAMPLED):
            values = self.library.values(quantity)
            if save:
                torch.save(values, reference)
            elif Path(reference).exists():
                error, count = distance(values, torch.load(reference))
                found = {"error": error, "compared": count}
        self.library.reset()
        return found

    def measure(self, quantity: str) -> Answer:
        """One run; where it is short it only warms the caches, and those after it count."""
        assert self.library is not None
        gc.collect()
        gc.disable()
        time.sleep(SETTLE)
        times = [self.seconds(quantity)]
        if times[0] < SPAN:
            times = [self.seconds(quantity)]
            while sum(times) < SPAN and len(times) < 10:
                times.append(self.seconds(quantity))
        gc.enable()
        self.library.reset()
        return {"times": times}

    def memory(self, state: str, setting: list, quantity: str) -> Answer:
        """The growth of the peak memory, on a CPU in a child that has run nothing else."""
        if self.device != "cpu":
            return self.peak(state, setting, quantity)
        here, there = os.pipe()
        child = os.fork()
        if not child:
            try:
                answer = self.peak(state, setting, quantity)
            except BaseException as error:
                answer = {"failed": describe(error)}
            os.write(there, json.dumps(answer).encode())
            os._exit(0)
        os.close(there)
        with os.fdopen(here) as pipe:
            text = pipe.read()
        os.waitpid(child, 0)
        return json.loads(text) if text else {"failed": "the process was ended"}

    def peak(self, state: str, setting: list, quantity: str) -> Answer:
        """The same in this process."""
        self.open(state, setting, batch=2)  # code that is loaded when first used
        self.seconds(quantity)
        self.open(state, setting)
        self.seconds(GRADIENT)
        assert self.library is not None
        self.library.reset()
        gc.collect()
        if self.device != "cpu":
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            self.seconds(quantity)
            return {"bytes": torch.cuda.max_memory_allocated() - before}
        before = reset_peak()
        self.seconds(quantity)
        return {"bytes": max(peak_bytes() - before, 0)}


def reset_peak() -> int:
    """Give unused memory back and let the peak begin anew, where the system can; the bytes in use."""
    try:
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
        return status("VmRSS")
    except (OSError, AttributeError):
        return peak_bytes()


def peak_bytes() -> int:
    """The most memory this process has had."""
    try:
        return status("VmHWM")
    except OSError:
        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def status(name: str) -> int:
    """A line of Linux's process status, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(name + ":"))


def describe(error: BaseException) -> str:
    """An error in one line."""
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0][:300]}"


def limit_memory(share: float = 0.75) -> None:
    """Let a too large request be an error of this process rather than the machine's."""
    try:
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        resource.setrlimit(resource.RLIMIT_DATA, (int(share * total),) * 2)
    except (OSError, ValueError):
        pass


def serve(worker: Worker, answers: TextIO) -> None:
    """Answer every line."""
    for line in sys.stdin:
        given = json.loads(line)
        try:
            answer = getattr(worker, given.pop("do"))(**given)
        except Exception as error:
            answer = {"failed": describe(error)}
        print(json.dumps(answer), file=answers, flush=True)


def main() -> None:
    """Find the library, and serve."""
    library, device, threads, folder = sys.argv[1:]
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    warnings.simplefilter("ignore")
    if folder:
        # In front of this folder, where a package of the same name lies as in one of the others.
        sys.path.insert(0, folder)
    torch.set_num_threads(int(threads))
    if device == "cpu":
        limit_memory()
    else:
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    serve(Worker(library, device), answers)


if __name__ == "__main__":
    main()
