"""Measure speed and memory of quantization-aware training, as ratios to the float model in one process."""
