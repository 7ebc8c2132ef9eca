"""Runtimes behind one protocol, the choice of the serving runtime, and its comparison with the reference.

protocol            `Engine`, `Features`, and the interface of each runtime's file
runtimes            the table of runtimes; parses "runtime[:precision]"
choice              `choose_engine`, `load_engine`: which runtime serves an artifact on this host
parity, knn_gate    the limits that an engine must meet before it serves
onnxruntime_engine  the default on a CPU; on a GPU through ONNX Runtime's providers
torch_engine        the reference; eager on a CPU, CUDA graphs on a GPU
tensorrt_engine     runs plans; tensorrt_export builds them, tensorrt_build is the build process,
                    tensorrt_plans stores them, cuda_memory wraps CUDA
activations         the ranges of activations that fp8 plans need
"""
