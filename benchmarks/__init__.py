"""Benchmarks of expo_fast. Run them from the root of a checkout."""
