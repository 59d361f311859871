"""Benchmarks, metrics and what may be concluded from them."""
