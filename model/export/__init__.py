"""Export of a checkpoint to an artifact.

options      the option records of an export
checkpoint   `export_checkpoint`: reads a file or a published model and exports it
graphs       which further graphs the command-line options select
artifact     `export_artifact`: weights, graphs, comparison and manifest, published in one rename
comparison   compares every graph with torch float32; runs the int8 gate
"""
