"""Weights to ONNX graphs."""
