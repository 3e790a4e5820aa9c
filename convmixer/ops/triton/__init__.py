"""The tensor functions in Triton, for CUDA devices: imported only where Triton is."""
