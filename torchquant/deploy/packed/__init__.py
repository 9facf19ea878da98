"""Write and read packed files, with weights as codes at their true width, and compare file sizes."""
