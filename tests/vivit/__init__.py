"""Tests of low-rank curvature."""
