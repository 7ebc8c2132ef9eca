"""Export of a checkpoint to an artifact.

options      the options of an export
checkpoint   `export_checkpoint`: exports a checkpoint file or a published model
graphs       selects the additional graphs from the command-line options
artifact     `export_artifact`: writes weights, graphs and manifest, and publishes them in one rename
comparison   compares every graph with torch float32 and runs the int8 gate
"""
