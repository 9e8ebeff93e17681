"""Hugging Face folders, PEFT adapters, safetensors headers, and the resume point of a run."""
