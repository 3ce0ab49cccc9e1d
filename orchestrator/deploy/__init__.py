"""What a run has learnt, as one ONNX file."""
