"""Training from scratch: recipes, augmentation, the loop, the history of a run."""

from convmixer.training.loop import TrainingResult, evaluate, train
from convmixer.training.recipes import RECIPES, Recipe, get_recipe

__all__ = ["RECIPES", "Recipe", "TrainingResult", "evaluate", "get_recipe", "train"]
