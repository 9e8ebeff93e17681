"""Files of text, conversations, translations and preferences to token bins."""
