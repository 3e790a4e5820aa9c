"""A model as files, on disk and on the Hugging Face Hub: read, checked, renamed, written, published."""
