"""A page on which people try models: a picture in, the classes, the places that speak for them, and times out.

`classifier` computes what the page shows, and `text` says it in words. `page` is the page in Gradio's components,
`server` puts it on the network, and `space` writes the files of a Hugging Face Space that does. Nothing leaves the
machine: the page asks no other host for anything, and tells browsers to let none of it through. Gradio comes with
`pip install 'convmixer[demo]'` and is imported when a page is made. The folder `photographs` holds its examples.
"""

from convmixer.demo.classifier import Answer, BackendTime, Classifier, open_classifiers
from convmixer.demo.server import serve
from convmixer.demo.space import write_space

__all__ = ["Answer", "BackendTime", "Classifier", "open_classifiers", "serve", "write_space"]
