"""The engines that run an artifact, all behind the protocol in `protocol.py`.

Each runtime has one file `*_engine.py` and one row in `runtimes.py`. `choice.py` selects the engine that serves an
artifact on this host. `parity.py` and `knn_gate.py` check an engine's features before it may serve.
"""
