"""English: translation prompts and frequent words."""
