"""Helpers with the names of the original."""
