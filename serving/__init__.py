"""The web page of sample.py."""
