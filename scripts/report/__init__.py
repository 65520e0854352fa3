"""What a model looks like: its parameters as rows, a map of its layers, spectra, an HTML page."""
