"""The training report, the evaluation report, the model card."""
