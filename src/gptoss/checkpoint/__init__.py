"""Files on disk <-> canonical weights. This room renames and never repacks."""
