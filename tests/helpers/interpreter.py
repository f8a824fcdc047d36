"""Triton's interpreter, in each version that the package takes."""

from __future__ import annotations

import os
from typing import Any


def interpret() -> None:
    """Kernels imported from here on run in Triton's interpreter. To be called before Triton is
    imported.

    That of Triton 3.6 takes an array of one element for a number, which NumPy 2.4 refuses.
    """
    os.environ["TRITON_INTERPRET"] = "1"
    from triton.runtime import interpreter

    patch = interpreter._patch_lang_tensor

    def patched(tensor: Any, scope: Any) -> None:
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    interpreter._patch_lang_tensor = patched
