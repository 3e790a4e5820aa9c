"""Inference over data sets of any size: a folder, shards or a table go in, Parquet files with a row per image come out.

    source --> data.parts (numbered parts) --> dataset (which are missing) --> predictor (decode, compute, write)
                                                                          \\-> cluster (the same, in Ray's actors)

A part becomes one file, which is written whole or not at all. So whoever computes a part, and how often, the folder
holds the same rows; what is missing after an interruption is the parts without a file. `manifest` keeps two runs from
sharing a folder.
"""
