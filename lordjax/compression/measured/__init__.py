"""What compression measures by running models: losses of variants, and choices made by them."""
