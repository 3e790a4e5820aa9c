"""This package's own C++ kernels for x86 CPUs.

    csrc/*.cpp, *.h  ->  library.py compiles and loads them
    FoldedConvMixer  ->  packing.py or int8.py packs the weights and calls the kernels  ->  features of images
    stem and blocks  ->  training.py calls the kernels forward and backward  ->  features of images, and gradients

`compiled_code.py` finds a folder that compiled code can be kept in and run from; other compilers use it, too. `int8.py`
derives the integers that the kernels compute with. Modules here may import `errors`, `files`, `hardware` and `ops/`,
but nothing of `runtime/`, which imports this room.
"""
