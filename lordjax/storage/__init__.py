"""Files on disk: tensors, shards, journals of unfinished runs, and saved models."""
