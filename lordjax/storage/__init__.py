"""Files: tensors, shards, journals of unfinished work, saved models."""
