"""HTML pages about training runs, and image sheets (grids of images, crops and features)."""
