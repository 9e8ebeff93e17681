"""Kinyarwanda: cleaning, identification, prompts, noun classes, the text of the demo."""
