"""Image sets. Each is a class that knows its shape without reading anything and loads onto the device as uint8."""
