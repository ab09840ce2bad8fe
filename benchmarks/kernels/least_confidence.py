"""Least-confidence sampling."""

from __future__ import annotations

from benchmarks.uncertainty import benchmark

BENCHMARKS = (benchmark("least_confidence", lambda p: 1 - p.max(1), "least_confident", "uncertainty_sampling"),)
