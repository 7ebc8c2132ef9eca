"""Answer requests that compare images with stored items: search, classification, and the search for a marked region."""
