"""Write quantized weights of linear layers in the formats of language model runtimes: compressed-tensors, GGUF."""
