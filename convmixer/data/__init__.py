"""Everything that opens images: one image, a folder, a tar, a table of labels, a data set of a library.

    source --> layout, tables (what is there: splits, classes, files) --> readers (open_split: one split)
           --> memory (all of it as uint8 tensors), stream (workers decode it, batch after batch), or parts (numbered,
               without labels, for inference; with `parquet`, images that tables hold)

`images` turns one file, URL (by `download`), array or PIL image into an upright 8-bit image; the others call it. Images
leave this room as uint8 tensors (B, C, H, W), or for `predict` as PIL images. Normalisation and random changes on the
device are not done here.

The room imports only `errors`. Of training's recipes it sees the type, in annotations. pandas, `datasets` and
`webdataset` are imported when a source needs them.
"""
