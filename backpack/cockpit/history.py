"""What a monitor has seen: in memory, and line by line in a file that outlives a killed run."""

from __future__ import annotations

import json
import math
import os
import warnings
from bisect import insort
from collections.abc import Iterator
from pathlib import Path
from typing import Any

Value = float | list[Any] | None


class History:
    """Numbers of tracked steps, and events.

    A step may come in several parts (``alpha`` is known one step later); they are put together.

    Attributes:
        header: what is known of the run: quantities, model, optimizer, when it began.
        events: alarms and notes, each a dict with ``step``, ``event`` and ``message``.

    Example:
        >>> history = History()
        >>> history.add(0, {"loss": 2.0, "grad_norm": 1.0})
        >>> history.add(10, {"loss": 1.5})
        >>> history.column("loss"), history.column("grad_norm")
        (([0, 10], [2.0, 1.5]), ([0], [1.0]))
    """

    def __init__(self, path: str | os.PathLike[str] | None = None) -> None:
        self.header: dict[str, Any] = {}
        self.events: list[dict[str, Any]] = []
        self._records: dict[int, dict[str, Any]] = {}
        self._order: list[int] = []
        self._path = None if path is None else Path(path)
        # What is still to be written, where that was not possible.
        self._waiting, self._failed = b"", False
        if self._path is not None:
            self._path.parent.mkdir(parents=True, exist_ok=True)

    # ---------------------------------------------------------------------------------
    # Writing

    def begin(self, step: int = 0, **header: Any) -> None:
        """A run begins, or goes on, at a step: what was seen from there on is no part of it."""
        self.header = {**self.header, **header}
        self._forget(step)
        self._write({"cockpit": 1, "begins": step, **header})

    def add(self, step: int, values: dict[str, Any], seconds: float | None = None) -> None:
        """Add numbers of a step."""
        record = dict(values) if seconds is None else {"time": seconds, **values}
        self._put(step, record)
        self._write({"step": step, **record})

    def _put(self, step: int, record: dict[str, Any]) -> None:
        if step not in self._records:
            self._records[step] = {}
            insort(self._order, step)
        self._records[step].update(record)

    def event(self, step: int, event: str, message: str, **more: Any) -> None:
        """Add an event."""
        entry = {"step": step, "event": event, "message": message, **more}
        self.events.append(entry)
        self._write(entry)

    def _forget(self, step: int) -> None:
        self._records = {k: v for k, v in self._records.items() if k < step}
        self._order = sorted(self._records)
        self.events = [each for each in self.events if each["step"] < step]

    def _write(self, line: dict[str, Any]) -> None:
        if self._path is not None:
            self._waiting += json.dumps(_strict(line)).encode() + b"\n"
            self.flush()

    def flush(self) -> None:
        """Write what could not be written before (the disk was full), from where that has ended."""
        if self._path is None or not self._waiting:
            return
        try:
            file = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
            try:
                while self._waiting:  # one call for each line: a killed run loses a line at most
                    self._waiting = self._waiting[os.write(file, self._waiting) :]
            finally:
                os.close(file)
            self._failed = False
        except OSError as error:
            if not self._failed:
                self._failed = True
                warnings.warn(
                    f"cockpit: {self._path} cannot be written ({error}); numbers are kept in memory, "
                    "and written once it can",
                    stacklevel=2,
                )

    # ---------------------------------------------------------------------------------
    # Reading

    @classmethod
    def read(cls, path: str | os.PathLike[str]) -> History:
        """Read what a run has written so far; it may go on, or have been killed."""
        history = cls()
        with Path(path).open() as file:
            for text in file:
                try:
                    line = _loose(json.loads(text))
                except json.JSONDecodeError:
                    continue  # cut off by the end of the process
                if isinstance(line, dict):
                    history._read(line)
        return history

    def _read(self, line: dict[str, Any]) -> None:
        if "cockpit" in line:
            self._forget(line.pop("begins", 0))
            line.pop("cockpit")
            self.header = {**self.header, **line}
        elif "event" in line:
            self.events.append(line)
        elif "step" in line:
            self._put(line.pop("step"), line)

    def __len__(self) -> int:
        return len(self._records)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """Records in order, each with its ``step``."""
        for step in self._order:
            yield {"step": step, **self._records[step]}

    @property
    def steps(self) -> list[int]:
        """Steps that were tracked."""
        return list(self._order)

    def at(self, step: int) -> dict[str, Any]:
        """The numbers of a step; empty if it was not tracked."""
        return dict(self._records.get(step, {}))

    def names(self) -> list[str]:
        """All keys, in the order in which they came."""
        return list(dict.fromkeys(key for record in self._records.values() for key in record))

    def column(self, key: str) -> tuple[list[int], list[Any]]:
        """The steps at which a key has a value, and the values."""
        found = [(step, self._records[step][key]) for step in self._order if key in self._records[step]]
        return [step for step, _ in found], [value for _, value in found]

    def recent(self, key: str, count: int, before: int | None = None) -> list[Any]:
        """The last values of a key, the latest last; of steps before one, if that is given.

        Args:
            key: the key.
            count: how many at most; as many tracked steps again are looked at for them.
            before: values of this step and of later ones do not count.
        """
        found: list[Any] = []
        for step in reversed(self._order[-2 * count :]):
            record = self._records[step]
            if key in record and (before is None or step < before):
                found.append(record[key])
        return found[:count][::-1]

    def layers(self, name: str) -> list[str]:
        """Layers (or parameters) for which a quantity has values of its own."""
        return [key[len(name) + 1 :] for key in self.names() if key.startswith(f"{name}/")]

    def last(self, key: str) -> Any:
        """The latest value of a key; ``None`` if there is none."""
        _, values = self.column(key)
        return values[-1] if values else None

    def to_pandas(self) -> Any:
        """A data frame with a row for each tracked step (pandas must be installed)."""
        import pandas

        rows = [{k: v for k, v in record.items() if not isinstance(v, dict)} for record in self]
        frame = pandas.DataFrame(rows)
        return frame.set_index("step") if len(frame) else frame

    def state_dict(self) -> dict[str, Any]:
        """All of it, in plain containers."""
        return {
            "header": self.header,
            "events": list(self.events),
            "records": {step: dict(record) for step, record in self._records.items()},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what :meth:`state_dict` gave."""
        self.header, self.events = dict(state["header"]), list(state["events"])
        self._records = {int(step): dict(record) for step, record in state["records"].items()}
        self._order = sorted(self._records)


_NAMES = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}


def _strict(value: Any) -> Any:
    """JSON has no numbers that are not finite: they are written by name."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, dict):
        return {key: _strict(each) for key, each in value.items()}
    return [_strict(each) for each in value] if isinstance(value, (list, tuple)) else value


def _loose(value: Any) -> Any:
    if isinstance(value, str):
        return _NAMES.get(value, value)
    if isinstance(value, dict):
        return {key: _loose(each) for key, each in value.items()}
    return [_loose(each) for each in value] if isinstance(value, list) else value
