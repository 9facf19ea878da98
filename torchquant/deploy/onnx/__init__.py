"""Writing and running ONNX files."""
