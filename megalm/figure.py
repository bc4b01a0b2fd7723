"""Pictures on machines without a display. No torch."""

from __future__ import annotations

import logging
import os
import tempfile
from pathlib import Path
from typing import Any


def new_figure(inches: tuple[float, float], dots_per_inch: int) -> Any:
    """An empty figure that needs no display, no configuration and no writable home folder.

    Args:
        inches: width and height.
        dots_per_inch: of the file that it is saved to.
    """
    if "MPLCONFIGDIR" not in os.environ and not os.access(Path.home(), os.W_OK):
        os.environ["MPLCONFIGDIR"] = tempfile.mkdtemp(prefix="matplotlib-")
    logging.getLogger("matplotlib").setLevel(logging.ERROR)  # a first start announces that it builds a font cache
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=inches, dpi=dots_per_inch, layout="constrained")
    FigureCanvasAgg(figure)
    return figure
