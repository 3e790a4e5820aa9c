"""Inference over data sets of any size: a folder, shards or a table go in, Parquet files with a row per image come out.

    source --> data.parts (numbered parts) --> dataset (which are missing) --> predictor (decode, compute, write)
                                                                          \\-> cluster (the same, in Ray's actors)

Each part becomes one file, which is written whole or not at all. So the rows do not depend on which process computes a
part, or on how often it is computed, and an interrupted run is resumed with the parts that have no file. `manifest`
keeps two runs from sharing a folder.
"""
