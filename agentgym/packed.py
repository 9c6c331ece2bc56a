"""Sequences of numbers as values: immutable, hashable, compared by content, 4 bytes an item.

Tuples cost 70 bytes a token, and bare arrays break the equality, hashing and encoding of the records that hold them.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, ClassVar

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, NDArray


class Packed:
    """A sequence of numbers over packed bytes: immutable, hashable, compared by value, 4 bytes an item."""

    __slots__ = ("data",)
    dtype: ClassVar[str]
    data: bytes

    def __init__(self, values: ArrayLike | Packed | bytes = b"") -> None:
        if isinstance(values, Packed):
            data = values.data
        elif isinstance(values, bytes):
            data = values
        else:
            import numpy as np

            data = np.asarray(values, self.dtype).tobytes()
        object.__setattr__(self, "data", data)

    def __setattr__(self, name: str, value: object) -> None:
        raise AttributeError(f"{type(self).__name__} is immutable")

    def numpy(self) -> NDArray[Any]:
        """A read-only view of the bytes, without a copy: [N]."""
        import numpy as np

        return np.frombuffer(self.data, self.dtype)

    def __len__(self) -> int:
        return len(self.data) // 4

    def __iter__(self) -> Iterator[Any]:
        return iter(self.numpy().tolist())

    def __getitem__(self, index: int | slice) -> Any:
        found = self.numpy()[index]
        return type(self)(found) if isinstance(index, slice) else found.item()

    def __add__(self, other: Packed) -> Any:
        return type(self)(self.data + other.data)

    def __eq__(self, other: object) -> bool:
        return type(other) is type(self) and other.data == self.data

    def __hash__(self) -> int:
        return hash((type(self), self.data))

    def __reduce__(self) -> tuple[type[Packed], tuple[bytes]]:
        return type(self), (self.data,)

    def __repr__(self) -> str:
        head = ", ".join(f"{v:.4g}" for v in self.numpy()[:6])
        return f"{type(self).__name__}([{head}{', ...' if len(self) > 6 else ''}], n={len(self)})"


class Ids(Packed):
    """Token ids, int32."""

    __slots__ = ()
    dtype = "<i4"


class Floats(Packed):
    """Log-probs and the like, float32."""

    __slots__ = ()
    dtype = "<f4"
