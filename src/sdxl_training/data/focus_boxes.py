"""Focus boxes of a whole index: one that does not lie in its picture is a reason why that picture takes no part.

Shape legend: M rows of a source's index, B of them with a box.
"""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from sdxl_training.data.crop_columns import read_boxes, written_boxes
from sdxl_training.data.crops import not_inside


def with_bad_boxes(table: pa.Table) -> pa.Table:
    """Return an index (schema INDEX) in which pictures with a box that is none have a reason; others keep theirs."""
    boxes, reasons = table["focus"].combine_chunks(), table["reason"].combine_chunks()
    judged_B = np.flatnonzero(pc.and_(pc.is_valid(boxes), pc.is_null(reasons)).to_numpy(zero_copy_only=False))
    heights_B, widths_B = (table[name].to_numpy()[judged_B] for name in ("height", "width"))
    bad_M = judged_B[~boxes_inside(boxes.take(pa.array(judged_B)), heights_B, widths_B)]
    if not len(bad_M):
        return table
    said = [
        f"its focus {not_inside(boxes[row].as_py(), (table['height'][row].as_py(), table['width'][row].as_py()))}"
        for row in bad_M.tolist()
    ]
    is_bad_M = np.zeros(table.num_rows, bool)
    is_bad_M[bad_M] = True
    changed = pc.replace_with_mask(reasons, pa.array(is_bad_M), pa.array(said, reasons.type))
    return table.set_column(table.schema.get_field_index("reason"), table.schema.field("reason"), changed)


def boxes_inside(boxes: pa.ListArray, heights_B: NDArray[np.int32], widths_B: NDArray[np.int32]) -> NDArray[np.bool_]:
    """Return which boxes (B,) leave something inside their pictures, as `crops.read_box` reads them."""
    size_B2 = np.stack([heights_B, widths_B], axis=1).astype(np.int64)
    return np.asarray(read_boxes(written_boxes(boxes), size_B2)[:, 2] > 0)
