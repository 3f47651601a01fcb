"""What travels from a data module to a method."""

from collections.abc import Mapping
from typing import Any

Batch = Mapping[str, Any]
"""`image` float (B, M, *spatial), M counts the task's further inputs; `label` integer (B, 1, *spatial), classes 0..C-1, -1 = ignored; `case` ids; `geometry`. Optional:
`raters` (B, R, *spatial) with `rater_mask` (B, R), `channel_mask` (B, M) where a modality is there, `outside` (B, M), what lies beyond the border of a case, `brain_mask`, any declared per-case map. An unlabeled batch has
no `label` at all; several streams arrive as a mapping of such batches. See docs/adding_a_method.md."""
