"""Which rank or format every site gets under one budget: error curves in, a plan out."""
