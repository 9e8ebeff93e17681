"""SentencePiece and tokenizer.json behind one interface, and chat templates."""
