"""Use features that the network has already computed: to find the foreground of an image, to compute vectors of image
regions, and to compare images patch by patch."""
