"""Tasks that only a memory can do. docs/tasks.md says exactly what each looks like."""

from pmnet.data.tasks.copy_paste import CopyPaste, filler_columns
from pmnet.data.tasks.episodes import Episodes, Piece, Problem, Span, training_batch
from pmnet.data.tasks.filler import Filler, text_of
from pmnet.data.tasks.lookup import Lookup
from pmnet.data.tasks.needle import Needle
from pmnet.data.tasks.recall import Recall
from pmnet.data.tasks.selective_copy import SelectiveCopy

__all__ = [
    "CopyPaste",
    "Episodes",
    "Filler",
    "Lookup",
    "Needle",
    "Piece",
    "Problem",
    "Recall",
    "SelectiveCopy",
    "Span",
    "filler_columns",
    "text_of",
    "training_batch",
]
