"""The certificate that a file computes what the model was evaluated with."""
