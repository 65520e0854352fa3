"""Writers that export models for other programs: transformers, PEFT and Orbax."""
