"""Draws on disk: a folder that can be read while it grows, and resumed after any death of its writer.

store                   the folder: names, one writer, the commit point of a chunk, damage
sink                    certified chunks on their way there
files                   a file is there and whole, or not there
zarr_files              draws as a zarr group of committed files
saved_run               what was asked for and what was chosen, as hashes and plain values
serialize               values of this package as bytes
stored_draws            the draws as one object, without the model
streaming_statistics    statistics of all draws in constant memory: batch_means, histogram, sums
"""
