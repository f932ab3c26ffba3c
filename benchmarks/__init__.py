"""Benchmarks: each prints ratios and returns them; ``python -m benchmarks`` runs them all."""
