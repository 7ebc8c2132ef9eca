"""A checkpoint becomes an artifact.

options      the records that an export takes
checkpoint   `export_checkpoint`: a file or a published model, read and exported
graphs       which further graphs a command line asks for
artifact     `export_artifact`: weights, graphs, comparison, manifest, in one rename
comparison   every graph beside torch float32, and the gate of int8
"""
