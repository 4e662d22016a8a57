"""Shapes in annotations are checked during tests: jaxtyping with beartype, inert in production."""

import os

if os.environ.get("RANKFOLD_CHECK_SHAPES", "1") == "1":
    from jaxtyping import install_import_hook

    install_import_hook(["rankfold.decompose", "rankfold.ranks", "rankfold.spectrum"], "beartype.beartype")
