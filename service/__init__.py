"""The REST service over an exported artifact. It loads without torch."""
