"""Post-training quantization: algorithms that choose weights, scales and roundings without training the model."""
