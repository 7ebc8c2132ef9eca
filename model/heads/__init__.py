"""Heads: small networks on a backbone's tokens that predict classes, a class per pixel, or depth.

record       describes a head (`head.json`), and defines which tokens each kind reads
linear       computes linear heads with numpy
dpt          writes the graph of a DPT depth head, which ONNX Runtime computes
published    reads and checks Meta's published heads
store        stores heads in an artifact, lists them, and opens them
class_names  names of the classes of ADE20K and Pascal VOC

No module in this package imports torch. `training/heads.py` fits new heads.
"""
