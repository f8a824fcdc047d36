"""Images over HTTP."""
