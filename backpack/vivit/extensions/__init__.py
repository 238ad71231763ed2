"""What vivit-for-pytorch has beside its computations: :mod:`backpack.vivit.extensions.hooks`."""
