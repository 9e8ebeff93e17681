"""Benchmark suites, their tasks and metrics, results and their comparison."""
