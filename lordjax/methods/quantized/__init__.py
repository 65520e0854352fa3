"""Quantized weights with a low-rank correction: LQ-LoRA, LoftQ, QERA, GPTQ."""
