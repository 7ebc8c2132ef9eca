"""What is computed from features that the network has already given; nothing here runs the network."""
