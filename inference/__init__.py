"""Generation with a KV cache, sampling, beam search, scoring, prompt formats."""
