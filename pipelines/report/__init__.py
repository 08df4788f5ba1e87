"""The page that a run leaves behind: one file that opens offline."""
