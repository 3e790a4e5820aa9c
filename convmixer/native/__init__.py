"""This package's own C++ kernels for x86 CPUs, `csrc/`: compile them, load them, pack a model for them."""
