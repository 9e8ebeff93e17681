"""The parts of the model: config.json, norms, rotary embeddings, attention, cross-entropy."""
