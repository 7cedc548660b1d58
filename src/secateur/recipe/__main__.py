"""``python -m secateur.recipe`` prints the JSON schema of recipes, for editors and other tools."""

import json
import sys

from secateur.recipe.schema import json_schema

sys.stdout.write(json.dumps(json_schema(), indent=2) + "\n")
