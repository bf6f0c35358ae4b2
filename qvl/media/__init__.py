"""Pictures and videos, from what a caller named to uint8 pixels of the size the model takes.

fetch (bytes from an address, safely) -> image / video (bytes to pixels) -> resize (the model's size) ; load ties
them.
"""
