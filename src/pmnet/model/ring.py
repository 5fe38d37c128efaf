"""Room for keys and values to come, so that a step does not move those that are there.

Shapes: B sequences, W window, K key/value heads, E head_dim.
"""

from torch import Tensor

from pmnet.model.attention import PastKeys


class Ring:
    """Buffers of keys and values with free places at the end; the window is a view that moves along.

    Args:
        window: keys and values per layer, `[B, W - 1, K, E]` each.
        length: places that will be filled; there are `ROOM` at least.
    """

    ROOM = 128

    def __init__(self, window: list[PastKeys], length: int = 1):
        self.offset, self.width, self.room = 0, window[0].keys.shape[1], max(self.ROOM, length)
        self.buffers = [PastKeys(*(_with_room(part, self.room) for part in past)) for past in window]

    def __reduce__(self) -> tuple[type["Ring"], tuple[list[PastKeys]]]:
        """Pickles hold the window: places that were never written are somebody's old memory."""
        return Ring, ([PastKeys(past.keys.clone(), past.values.clone()) for past in self.window()],)

    @property
    def free(self) -> int:
        """Places for the keys of positions to come."""
        return self.room - self.offset

    def window(self) -> list[PastKeys]:
        """The last `W - 1` keys and values of every layer."""
        part = slice(self.offset, self.offset + self.width)
        return [PastKeys(buffer.keys[:, part], buffer.values[:, part]) for buffer in self.buffers]


def _with_room(x: Tensor, room: int) -> Tensor:
    buffer = x.new_empty(x.shape[0], x.shape[1] + room, *x.shape[2:])
    buffer[:, : x.shape[1]] = x
    return buffer
