"""What a recipe changes in the course of a run: the learning rate, and the size of the images.

`progress` is the part of the run that is over, in [0, 1].
"""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from convmixer.training.recipe import Recipe


def learning_rate(recipe: Recipe, progress: float) -> float:
    """Return the learning rate: it rises during `warmup`, falls to `knee`, and ends at 0, on straight lines.

    Example:
        >>> from convmixer.training import Recipe
        >>> from convmixer.training.schedule import learning_rate
        >>> [learning_rate(Recipe(lr=0.04, warmup=0.5, knee=(0.75, 0.5)), p) for p in (0.25, 0.5, 0.75, 1.0)]
        [0.02, 0.04, 0.02, 0.0]
    """
    corners = [(0.0, 0.0 if recipe.warmup else 1.0), (recipe.warmup, 1.0), recipe.knee, (1.0, 0.0)]
    for (x0, y0), (x1, y1) in itertools.pairwise(corners):
        if progress <= x1 and x1 > x0:
            return recipe.lr * (y0 + (y1 - y0) * (progress - x0) / (x1 - x0))
    return 0.0


def image_size(recipe: Recipe, progress: float) -> int | None:
    """Return the shorter side of training images in pixels, by `image_sizes`; None for the model's own size.

    Example:
        >>> from convmixer.training import Recipe
        >>> from convmixer.training.schedule import image_size
        >>> recipe = Recipe(image_sizes=((0.0, 16), (0.5, 32)))
        >>> image_size(recipe, 0.2), image_size(recipe, 0.9), image_size(Recipe(), 0.2)
        (16, 32, None)
    """
    reached = [size for start, size in recipe.image_sizes if progress >= start]
    return reached[-1] if reached else None
