"""What knows a language; each language is a folder."""
