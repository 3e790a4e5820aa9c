"""Training from scratch: recipes, augmentation, the loop, the history of a run."""

from convmixer.training.recipes import RECIPES, Recipe, get_recipe
from convmixer.training.session import TrainingResult, train
from convmixer.training.validation import evaluate

__all__ = ["RECIPES", "Recipe", "TrainingResult", "evaluate", "get_recipe", "train"]
