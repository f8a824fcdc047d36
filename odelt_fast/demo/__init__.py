"""The page with the dials."""
