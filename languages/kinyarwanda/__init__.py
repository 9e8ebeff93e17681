"""All that knows Kinyarwanda: normalising text, noun classes, the demo's little world."""
