"""Quantized weights with a low-rank term: LQ-LoRA, LoftQ, QERA, GPTQ."""
