"""Measurements; programs, not tests."""
