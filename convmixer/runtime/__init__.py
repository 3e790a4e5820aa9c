"""A trained model in the form in which this machine computes it fastest, or in files for other programs.

    ConvMixer  ->  folding.py removes every BatchNorm  ->  FoldedConvMixer
    optimize.py  checks what is asked for, as a protocol.Request
      ->  choose.py  asks each backend whether it can compute the model, and builds the first or times them all
      ->  eager, compile, triton, openvino, onnxruntime, native .py  each a Backend and the runtime that it builds
      ->  optimized_model.py  the module around the runtime, which callers get
    export.py  writes a file, opens it again and compares the outputs
    benchmark.py  times benchmark_cases.py, by timing.py

What several backends share: `chunks.py` splits batches, `graph_cache.py` keeps compiled graphs by shape,
`cuda_graphs.py` replays calls, `convert.py` is the one way to ONNX and OpenVINO, `quantize.py` has calibration images
and checks int8. To add a backend, write its file and add it to the table in `choose.py`.

Modules here may import `model`, `inference`, `native/`, `ops/` and `hub.checkpoints`, but not `training/` or `cli/`;
`benchmark.py` also imports `factory`.
"""
