"""How weights are stored."""

from polymoe.formats.packed import pack_, unpack_

__all__ = ["pack_", "unpack_"]
