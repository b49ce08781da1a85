"""Preprocessors by name: canny, the picture itself, and the detectors of controlnet_aux."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from diffedit import Preprocessor, errors

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    Pixels8 = npt.NDArray[np.uint8]

#: Where the detectors' authors publish their weights. They are pickles, which torch (2.6 and later)
#: reads as tensors only; the detectors know no other format.
ANNOTATORS = "lllyasviel/Annotators"

#: name: (class in controlnet_aux, what it finds). Left out: ContentShuffleDetector, which draws
#: from NumPy's global generator, so that no result could be made again.
DETECTORS: dict[str, tuple[str, str]] = {
    "depth_leres": ("LeresDetector", "depth (LeReS)"),
    "depth_midas": ("MidasDetector", "depth (MiDaS)"),
    "depth_zoe": ("ZoeDetector", "depth (ZoeDepth)"),
    "hed": ("HEDdetector", "soft edges (HED)"),
    "lineart": ("LineartDetector", "line drawing"),
    "lineart_anime": ("LineartAnimeDetector", "line drawing of cartoons"),
    "mlsd": ("MLSDdetector", "straight lines (M-LSD)"),
    "normal_bae": ("NormalBaeDetector", "surface normals (Bae)"),
    "openpose": ("OpenposeDetector", "body pose"),
    "pidinet": ("PidiNetDetector", "soft edges (PiDiNet)"),
}


def canny(pixels: Pixels8, low: int = 100, high: int = 200) -> Pixels8:
    """Edges by Canny 1986, white on black: ``(h, w, 3)`` uint8 in and out.

    Args:
        pixels: RGB.
        low: gradients below this are no edge.
        high: gradients above this are one; between, if they touch one.
    """
    import cv2
    import numpy as np

    edges = cv2.Canny(np.ascontiguousarray(pixels), low, high)
    return np.repeat(edges[..., None], 3, axis=2)


def picture(pixels: Pixels8) -> Pixels8:
    """The picture as it is: networks for inpainting are shown it, and told of the mask besides."""
    return pixels


def _detector(name: str, weights: str | None) -> Callable[[Pixels8], Pixels8]:
    """A detector of controlnet_aux, its weights loaded from a folder or hub id."""
    import controlnet_aux
    import numpy as np

    source = weights or ANNOTATORS
    made: Any = getattr(controlnet_aux, DETECTORS[name][0])
    try:
        detector = made.from_pretrained(source)
    except Exception as error:
        said = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise errors.ModelError(
            f"preprocessor {name!r}: no weights to load from {source!r} ({said});"
            " give a folder that holds them (controlnet: weights)"
        ) from error

    def detect(pixels: Pixels8) -> Pixels8:
        height, width = pixels.shape[:2]
        side = max(64, min(height, width))  # they round to multiples of 64
        found = np.asarray(
            detector(pixels, detect_resolution=side, image_resolution=side, output_type="np")
        )
        if found.ndim == 2:
            found = np.repeat(found[..., None], 3, axis=2)
        if found.shape[:2] != (height, width):  # detectors round to multiples of 64
            import cv2

            found = cv2.resize(found, (width, height), interpolation=cv2.INTER_LINEAR)
        return found.astype(np.uint8)

    return detect


PREPROCESSORS = (
    Preprocessor("canny", lambda weights: canny, "edges (Canny)"),
    Preprocessor("inpaint", lambda weights: picture, "the picture around the mask"),
    *(
        Preprocessor(name, functools.partial(_detector, name), found, ANNOTATORS)
        for name, (_, found) in DETECTORS.items()
    ),
)
