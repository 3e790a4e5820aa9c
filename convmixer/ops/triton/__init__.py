"""The tensor functions in Triton, for CUDA devices. Imported only where Triton is installed.

    launch (checks tensors, chooses a tile, launches) --> tables (which tile) --> kernels (what runs on the GPU)

`launch` has the functions of `ops.reference` by the same names, as custom operators that compilers take whole. `tune`
measures tiles on the GPU at hand and writes the fastest to a file in the user's cache, which `tables` reads.

The room imports `errors` and `ops.limits`.
"""
