"""The network prepared for sampling."""
