"""Integration of velocity fields in time."""
