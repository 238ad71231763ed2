"""Every backward pass of the tests is certified."""

from __future__ import annotations

from backpack import certificate

certificate.default = "always"
