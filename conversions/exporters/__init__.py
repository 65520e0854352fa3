"""Writers of models for other programs: transformers, PEFT, Orbax."""
