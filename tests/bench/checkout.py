"""The checkout that these programs belong to, and the package of another one.

Whoever imports this may import `mixtral` and the tests' helpers, without installing anything.
"""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]


def import_old(folder: Path) -> ModuleType:
    """The package `mixtral` of the checkout in `folder`, as a module named old_mixtral.

    Raises FileNotFoundError if the folder has no such package.
    """
    package = folder.resolve() / "mixtral"
    if not (package / "__init__.py").is_file():
        raise FileNotFoundError(f"{folder} is not a checkout: {package}/__init__.py is missing")
    spec = importlib.util.spec_from_file_location(
        "old_mixtral", package / "__init__.py", submodule_search_locations=[str(package)]
    )
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    # Its files import one another relatively, so all of them come from that folder.
    sys.modules["old_mixtral"] = module
    spec.loader.exec_module(module)
    return module
