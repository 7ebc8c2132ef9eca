"""The vision tasks, such as attention maps, segmentation, depth and matching, and their algorithms. All of them use
features that the network has already computed."""
