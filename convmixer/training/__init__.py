"""Training: from a recipe and images to the folder of a finished run.

`session` runs a training from start to finish and shows what the other modules do. What it gets comes from `recipe` and
`recipes` (what to train, and how), `schedule` (what changes during a run), `splits` (images, through `convmixer.data`)
and `machine` (device, precision and processes); `checks` says whether these go together. In each epoch `augment` turns
uint8 images into the parts of every step, `trainer` takes the steps with what `optimizers` builds, `validation`
measures the result, and `run` writes it to the folder, with `history` for the rows of its table. `signals` stops a run
without losing work.

Modules here may import the model, `factory`, `data`, `ops`, `hub.checkpoints`, `inference` and `plots`, but not
`evaluation`, `hub.publish` or `cli`. `data` never imports this room; it takes a `Recipe` as an argument.
"""

from convmixer.training.recipe import Recipe
from convmixer.training.recipes import RECIPES, get_recipe
from convmixer.training.session import TrainingResult, train
from convmixer.training.validation import evaluate

__all__ = ["RECIPES", "Recipe", "TrainingResult", "evaluate", "get_recipe", "train"]
