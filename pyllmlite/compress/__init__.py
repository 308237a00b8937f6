"""Makes a model light: quantizing layer by layer, writing checkpoints, measuring the loss."""
