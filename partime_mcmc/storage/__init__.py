"""Draws on disk: a folder of certified chunks that can be read while it grows, and resumed after any death of its writer.

layout        the folder: names, one writer
chunks        files of draws, whole or in parts
formats       what a chunk is written as: NetCDF, Zarr
codec         strategies and reports of this package as JSON
fingerprint   what a run hangs on, as hashes and plain values
plan          what a run needs to go on, written once
state         what passes from chunk to chunk
lazy          draws read when they are looked at
stored        the draws as one object, without the model
"""
