"""Image sets. The shape of an image set is known before its files are read; the images are loaded onto the device as uint8."""
