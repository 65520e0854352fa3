"""What a compression will cost and leave, from shapes alone: operations, seconds, memory, bytes."""
