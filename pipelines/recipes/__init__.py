"""The recipes: published systems as stages on one engine."""

from __future__ import annotations

from actors.errors import RunError
from pipelines.recipes import eplc, label_shift, meta_pseudo_labels, mrnet, proda, rectified
from pipelines.recipes.recipe import Recipe

RECIPES: dict[str, Recipe] = {
    module.RECIPE.name: module.RECIPE for module in (eplc, rectified, mrnet, proda, meta_pseudo_labels, label_shift)
}


def recipe(name: str) -> Recipe:
    """The recipe of a name.

    Raises:
        RunError: there is none; the known ones are listed.
    """
    if name not in RECIPES:
        raise RunError(f"unknown recipe {name!r}; known are {', '.join(RECIPES)}")
    return RECIPES[name]
