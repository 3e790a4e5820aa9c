"""Training from scratch: recipes, data in memory, the loop, the history of a run."""

from convmixer.training.loop import TrainingResult, evaluate, train
from convmixer.training.recipes import RECIPES, Recipe, get_recipe
from convmixer.training.run import TrainingStopped

__all__ = ["RECIPES", "Recipe", "TrainingResult", "TrainingStopped", "evaluate", "get_recipe", "train"]
