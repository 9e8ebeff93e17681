"""The runs behind the figures of docs/: each is a command that skips what was run already."""
