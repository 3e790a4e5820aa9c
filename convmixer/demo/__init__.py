"""A page to try models: for a picture it shows classes, a class activation map, and how fast backends are.

`classifier` computes what the page shows, and `text` writes it as text. `page` builds the page of Gradio's components,
`server` serves it, and `space` writes the files of a Hugging Face Space that serves it. Nothing leaves the machine: the
page asks no other host for anything, and a policy keeps browsers from doing so. Gradio comes with
`pip install 'convmixer[demo]'`, and is imported when a page is built. The folder `photographs` holds the examples.
"""

from convmixer.demo.classifier import Answer, BackendTime, Classifier, open_classifiers
from convmixer.demo.server import serve
from convmixer.demo.space import write_space

__all__ = ["Answer", "BackendTime", "Classifier", "open_classifiers", "serve", "write_space"]
