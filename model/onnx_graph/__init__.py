"""Writes ONNX graphs from weights, with numpy only.

build      `GraphSpec`, `write_onnx`: writes the graph of a backbone
nodes      adds nodes, constants and weights to a graph
positions  computes the position embedding in a graph that accepts any size
linear     adds linear layers in each precision
quantize   quantizes weights to eight bits
"""
