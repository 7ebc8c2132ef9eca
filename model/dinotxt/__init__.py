"""dino.txt: compares images with text, using a DINOv2 backbone that Meta extended with two further networks.

The vision head refines the backbone's tokens, and the text encoder turns text into vectors of the same space. Both run
here with numpy, without torch. Source: facebookresearch/dinov2, `dinov2/hub/dinotxt.py` and `dinov2/hub/text/`.
"""
