"""Export of a checkpoint to an artifact.

options      the options of an export
checkpoint   exports a checkpoint file or a published model (`export_checkpoint`)
graphs       selects the additional graphs from the command-line options
artifact     writes weights, graphs and manifest, and moves them into place with one rename (`export_artifact`)
comparison   compares every graph with a reference and runs the k-NN gate of int8 graphs
"""
