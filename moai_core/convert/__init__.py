"""In and out of the formats that Mamba users have; see source.py for how they meet."""
