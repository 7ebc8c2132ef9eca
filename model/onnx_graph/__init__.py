"""Conversion of weights to ONNX graphs, with numpy only.

build      `GraphSpec`, `write_onnx`: the graph of a backbone
nodes      adds nodes, constants and weights to a graph
positions  the position embedding of a graph that accepts any size
linear     linear layers in each precision
quantize   weights in eight bits
"""
