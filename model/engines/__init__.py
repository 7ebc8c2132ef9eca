"""The engines that run an artifact (an exported model). All implement the protocol `Engine` in `protocol.py`.

Each runtime has a row in `runtimes.py` and an implementation in a file `*_engine.py`. `choice.py` selects the engine
that serves an artifact on this host. `parity.py` and `knn_gate.py` check an engine's features before the engine may
serve.
"""
