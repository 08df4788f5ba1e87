"""Pseudo labels as files: out of a run, into a run, and to and from the folders of the systems in the field."""
