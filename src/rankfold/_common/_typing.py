"""Types in annotations: ranks; shapes by jaxtyping where it is installed (the tests check it), else plain tensors."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeAlias

Rank: TypeAlias = int | tuple[int, ...]
"""A rank: one number, or one for every bond or mode."""

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
