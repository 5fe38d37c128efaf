"""The phasor memory tree: what persists, where a position goes, what it writes and reads."""

from .pmnet_memory_read import MemoryRead
from .pmnet_memory_state import empty_memory
from .pmnet_memory_write import MemoryWrite, Tokens, Visit

__all__ = ["MemoryRead", "MemoryWrite", "Tokens", "Visit", "empty_memory"]
