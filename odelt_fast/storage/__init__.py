"""Where files lie: folders here, and behind URLs."""
