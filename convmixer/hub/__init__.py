"""Models as files, on disk and on the Hugging Face Hub: read, checked, converted, written, published.

    a name, a folder, a file --> client (download) --> config, checkpoints --> factory builds the model
    a model --> publishable (what is known of it) --> write_config, card (files) --> verify --> client (one commit)

The room has two layers. The lower one handles files and stands below the factory:

- `client`: downloads from the Hub, checked before their first use, and commits to it
- `checkpoints`: tensors in safetensors files, and which model a file holds
- `config`, `write_config`: config.json read and checked; config.json of a live model
- `foreign`, `json_limits`: names of other programs' tensors; how much of a stranger's JSON is parsed

The upper one, `publish` with `publishable`, `card` and `verify`, and `convert`, builds models: it may import the
factory, inference and training's recipes. Only `client` and `card` import `huggingface_hub`.
"""
