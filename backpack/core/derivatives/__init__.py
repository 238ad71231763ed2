"""Names that programs import; see :mod:`backpack.core.derivatives.convnd`."""
