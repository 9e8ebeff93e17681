"""Measurements beside the tests, run by hand: `python -m bench.NAME` says what it ran on."""
