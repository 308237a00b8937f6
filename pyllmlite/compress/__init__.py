"""Making a model lighter: calibration, quantizing layer by layer, plans of bits."""
