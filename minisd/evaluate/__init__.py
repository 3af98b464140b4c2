"""Which checkpoint of a run to keep: pictures of each, measured, and a pick."""
