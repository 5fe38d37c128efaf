"""The phasor memory tree: what persists, where a position goes, what it writes and reads."""

from pmnet.memory.anchors import Anchors
from pmnet.memory.read import MemoryRead
from pmnet.memory.routing import Visit, enter, hand_down
from pmnet.memory.state import empty_memory
from pmnet.memory.write import MemoryWrite, Tokens

__all__ = ["Anchors", "MemoryRead", "MemoryWrite", "Tokens", "Visit", "empty_memory", "enter", "hand_down"]
