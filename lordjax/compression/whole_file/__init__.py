"""Everything that a model's files hold: matrices outside the blocks, and budgets of bytes."""
