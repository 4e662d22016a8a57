"""Shapes in annotations: jaxtyping where it is installed (the tests check it), plain tensors otherwise."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jaxtyping import Float as Float
else:
    try:
        from jaxtyping import Float
    except ImportError:

        class Float:
            """Replaces `jaxtyping.Float`: `Float[Tensor, "out in"]` is `Tensor`."""

            def __class_getitem__(cls, item: tuple[Any, str]) -> Any:
                """Return the array type alone."""
                return item[0]
