"""The recipe: everything that decides about a run, as data that can be checked, stored and compared."""

from secateur.recipe.load import bundled, dump_recipe, load_recipe
from secateur.recipe.overrides import Setting
from secateur.recipe.schema import Recipe, json_schema

__all__ = ["Recipe", "Setting", "bundled", "dump_recipe", "json_schema", "load_recipe"]
