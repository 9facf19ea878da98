"""Write and run ONNX files."""
