"""Speed and memory of quantization-aware training, as ratios against the float model in one process."""
