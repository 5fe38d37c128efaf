"""The phasor memory tree: what persists, where a position goes, what it writes and reads."""

from .pmnet_memory_anchors import Anchors
from .pmnet_memory_read import MemoryRead
from .pmnet_memory_routing import Visit, enter, hand_down
from .pmnet_memory_state import empty_memory
from .pmnet_memory_write import MemoryWrite, Tokens

__all__ = ["Anchors", "MemoryRead", "MemoryWrite", "Tokens", "Visit", "empty_memory", "enter", "hand_down"]
