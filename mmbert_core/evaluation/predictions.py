"""The prediction file: columns, format, decimals, quoting, cells that a spreadsheet would compute.

`<id_name>` (if set), `prob` (several classes: `prob_<class>` each), `label` (if the input has it), `pred`, `prob_calibrated`
(of class 1; several classes: of the predicted one).
"""

import numpy as np

BINARY_THRESHOLD = 0.5


def predicted_classes(preds: np.ndarray, *, threshold: float = BINARY_THRESHOLD) -> np.ndarray:
    """Class index [N] int64 from probabilities of class 1 [N] (1 above the threshold), or of all classes [N, K] (the first largest)."""
    # float64: a threshold between two neighbouring float32 must not become one of them
    return (preds > np.float64(threshold)).astype(np.int64) if preds.ndim == 1 else preds.argmax(axis=1)
