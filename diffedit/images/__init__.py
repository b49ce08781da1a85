"""Open, convert and save pictures without losing a value.

Units, once for the whole package:

* sizes are ``(width, height)``, arrays are ``(height, width[, channels])``;
* ``Picture.pixels`` are integers: uint8 in [0, 255] or uint16 in [0, 65535];
* ``rgb()`` and masks are float32 in [0, 1]; a mask is 1 where the picture may change;
* luminance is Rec. 601 luma (0.299, 0.587, 0.114), as in Pillow's and OpenCV's grey conversions.

Pillow opens 16-bit RGB as 8-bit without a word, so the pixels of 16-bit files are read with OpenCV
or tifffile; Pillow reads everything else and the metadata. PNG and TIFF are written here, in one
way for every depth and channel count, because no library at hand writes them all with their
profile and EXIF.
"""

from diffedit.images.picture import Picture
from diffedit.images.png import encode_png
from diffedit.images.reading import ImageSource, open_picture, read_mask
from diffedit.images.writing import save_picture

__all__ = ["ImageSource", "Picture", "encode_png", "open_picture", "read_mask", "save_picture"]
