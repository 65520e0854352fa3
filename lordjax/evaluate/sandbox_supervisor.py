"""Starts `isolation.supervisor` without the rest of the package; `sandbox` runs this file.

Importing lordjax itself would take longer than most programs run.
"""

from __future__ import annotations

import os
import sys
import types

if __name__ == "__main__":
    folder = os.path.dirname(os.path.abspath(__file__))
    for name, path in {"lordjax": os.path.dirname(folder), "lordjax.evaluate": folder}.items():
        sys.modules[name] = types.ModuleType(name)
        sys.modules[name].__path__ = [path]
    from lordjax.evaluate.isolation.supervisor import main

    main()
