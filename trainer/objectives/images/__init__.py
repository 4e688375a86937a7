"""Image data, captions and measures of quality, which the image objectives share."""
