"""Statistics of references in files: what others publish, and what was computed here before."""
