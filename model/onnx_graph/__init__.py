"""Writes ONNX graphs from weights, with numpy only.

spec       the options of a graph (`GraphSpec`)
build      writes the graph of a backbone (`write_onnx`)
nodes      adds nodes, constants and weights to a graph
positions  computes the position embedding in a graph that accepts any size
linear     adds linear layers in each precision
foreign    finds graphs that do not belong to the weights
quantize   quantizes weights to eight bits
"""
