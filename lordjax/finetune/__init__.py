"""Fine-tuning of compressed models: what is trained, the jitted step, a run on disk."""
