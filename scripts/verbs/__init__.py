"""What each command does, without its options."""
