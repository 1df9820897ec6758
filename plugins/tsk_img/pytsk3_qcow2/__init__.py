"""QCOW2 images for pytsk3 scripts: change one line, and choose which state to see.

``pytsk3.Img_Info(path)`` becomes ``pytsk3_qcow2.open_image(path)``, or
``pytsk3_qcow2.Img_Info(path, snapshot="before-incident")``.
"""

from .image import Img_Info, open_image, states

__all__ = ["Img_Info", "open_image", "states"]
