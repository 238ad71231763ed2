"""The base class of quantities, and the original's names for what to do at unknown modules.

There is nothing to fail at: every quantity holds for every module.
"""

from backpack.quantities.base import BackpropExtension

FAIL_ERROR = "ERROR"
FAIL_WARN = "WARNING"
FAIL_SILENT = "SILENT"

__all__ = ["FAIL_ERROR", "FAIL_SILENT", "FAIL_WARN", "BackpropExtension"]
